"""What was measured at each step, from the files that trainers leave."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dcpconv.runs.finding import FoundStep
from dcpconv.runs.layouts import TRAINER_STATE
from dcpconv.runs.listing import text_of, typed_path

_LOGS = ("metrics.jsonl", "metrics.eval.jsonl")
_STEP_NAMES = ("global_step", "step")


def read_metrics(
    run_dir: str | os.PathLike[str], steps: Sequence[FoundStep]
) -> dict[int, dict[str, float]]:
    """Every number that was logged for a step of the run, by step and name.

    ``trainer_state.json`` (its ``log_history``) and ``metrics.json`` are read from each step,
    ``metrics.jsonl`` and ``metrics.eval.jsonl`` from the run.

    Source: transformers 5.23 ``TrainerState.log_history``; facebookresearch/lingua@437d680
    ``lingua/metrics.py`` and ``apps/main/eval.py``: one JSON object a line, with ``global_step``.
    """
    found: dict[int, dict[str, float]] = {step.step: {} for step in steps if step.step is not None}
    for number, values in _records(typed_path(run_dir), steps):
        if isinstance(number, int) and number in found:
            found[number] |= dict(_numbers(values))
    return found


def _records(
    run_dir: Path, steps: Sequence[FoundStep]
) -> Iterator[tuple[object, Mapping[str, object]]]:
    for directory in dict.fromkeys((run_dir, *(step.path.parent for step in steps[:1]))):
        for place in (directory.parent, directory):
            for name in _LOGS:
                for line in _text(place / name).splitlines():
                    values = _mapping(line)
                    yield _number_of(values), values
    for step in steps:
        if step.path.is_dir():
            yield step.step, _mapping(_text(step.path / "metrics.json"))
            history = _mapping(_text(step.path / TRAINER_STATE)).get("log_history")
            for values in history if isinstance(history, list) else ():
                # Earlier steps may be of another run that was continued elsewhere.
                if isinstance(values, dict) and values.get("step") == step.step:
                    yield step.step, values


def _number_of(values: Mapping[str, object]) -> object:
    return next((values[name] for name in _STEP_NAMES if name in values), None)


def _text(path: Path) -> str:
    try:
        return text_of(path).decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _mapping(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _numbers(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                yield prefix + name, float(value)
            except OverflowError:  # 10 ** 400 is a whole number in JSON, and no metric
                continue
