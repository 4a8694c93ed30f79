"""Looks into every step as far as headers go: what a listing by names cannot see.

Memory: one step's headers.  No tensor is read, and nothing in a pickle is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dcpconv.core.errors import DcpconvError
from dcpconv.formats import dcp, torchfile
from dcpconv.formats.opening import open_checkpoint
from dcpconv.formats.torchfile.archive import read_archive
from dcpconv.runs.finding import FoundStep, find_checkpoints
from dcpconv.runs.layouts import TRAINER_STATE

_ARCHIVES: Final = (".pt", ".pth", ".bin")
_LARGEST_JSON: Final = 1 << 28
"""Bytes; a log of millions of lines."""


@dataclass(frozen=True, slots=True)
class StepCheck:
    """One step and everything that is wrong with it, as far as headers tell."""

    step: FoundStep
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {**self.step.to_json(), "complete": bool(self), "problems": list(self.problems)}


def verify_checkpoints(run_dir: str | os.PathLike[str]) -> Iterator[StepCheck]:
    """Every step of a run with its problems, one after the other.

    Raises:
        NotACheckpointError: ``run_dir`` is a file.
    """
    return map(verify_step, find_checkpoints(run_dir))


def verify_step(step: FoundStep) -> StepCheck:
    """Opens the weights and everything beside them."""
    problems = list(step.problems)
    if step.form is not None and not problems:
        found: list[str] = []
        try:
            open_checkpoint(step.weights, problems=found)
        except DcpconvError as error:
            found.append(error.in_one_line)
        problems += found
    if step.path.is_dir():
        for file in sorted(path for path in step.path.rglob("*") if path.is_file()):
            name = file.relative_to(step.path).as_posix()
            problems += [f"{name}: {reason}" for reason in _file_problems(file, step)]
        for directory in sorted(path for path in step.path.iterdir() if dcp.is_dcp(path)):
            if directory != step.weights:
                problems += _directory_problems(directory)
    return StepCheck(step, tuple(dict.fromkeys(problems)))


def _directory_problems(directory: Path) -> list[str]:
    found: list[str] = []
    try:
        dcp.read_catalog(directory, problems=found)
    except DcpconvError as error:
        found.append(error.in_one_line)
    return [f"{directory.name}: {problem}" for problem in found]


def _file_problems(file: Path, step: FoundStep) -> Iterator[str]:
    size = file.stat().st_size
    if size == 0:
        return
    if file.suffix == ".json" and size <= _LARGEST_JSON:
        try:
            values = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            yield f"is not JSON ({error})"
            return
        number = values.get("global_step") if isinstance(values, dict) else None
        if file.name == TRAINER_STATE and step.step is not None and number != step.step:
            yield f"says global_step {number}, but the directory is step {step.step}"
    elif file.suffix in _ARCHIVES and file != step.weights and torchfile.is_torch_file(file):
        with file.open("rb") as opened:
            descriptor = opened.fileno()
            try:
                read_archive(
                    lambda offset, nbytes: os.pread(descriptor, nbytes, offset), size, str(file)
                )
            except DcpconvError as error:
                yield error.headline
