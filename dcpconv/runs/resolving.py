"""Turns what a user wrote after ``--resume`` into one step, or says what would be understood."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.runs.errors import RunError, WantedError, command, told
from dcpconv.runs.finding import (
    FoundStep,
    find_checkpoints,
    latest_first,
    look_at,
    look_into,
    names_in,
)
from dcpconv.runs.layouts import layout_of
from dcpconv.runs.listing import typed_path
from dcpconv.runs.metrics import read_metrics
from dcpconv.runs.retention import Best, choose_best, counted
from dcpconv.runs.verifying import verified

_NO: Final = frozenset({"no", "none", "false"})
_LATEST: Final = frozenset({"latest", "last", "yes", "true"})
_UNDERSTOOD: Final = (
    ("latest", "the complete step with the highest number; an error where there is none"),
    ("auto", "the same, or a fresh start where there is none"),
    ("latest pretrain", "the latest of that run, where MiniMind keeps several"),
    ("best:eval_loss:min", "the step with the least (or max: greatest) value of a metric"),
    ("a number", "that step"),
    ("a path", "that step, wherever it is"),
    ("no, none", "a fresh start"),
)


def find_latest_checkpoint(
    run_dir: str | os.PathLike[str], run: str | None = None, *, verify: bool = False
) -> FoundStep | None:
    """The complete step with the highest number, or ``None`` where there is none.

    Args:
        run_dir: Where a run keeps its steps.
        run: Which of several runs of MiniMind: ``pretrain`` or ``pretrain_512``.
        verify: Open every form of a step before it is the answer, down to the headers.

    Raises:
        NotACheckpointError: ``run_dir`` is a file, or cannot be read.
        RunError: There is no such run.
        WantedError: MiniMind files of several runs lie in ``run_dir``: which is meant?
    """
    for step in latest_first(run_dir, run):
        if _judged(step, verify=verify).is_complete:
            return step
    return None


def _judged(step: FoundStep, *, verify: bool) -> FoundStep:
    return verified(step) if verify and step.is_complete else step


def resolve_checkpoint(
    wanted: str | int | os.PathLike[str] | None,
    run_dir: str | os.PathLike[str],
    *,
    verify: bool = False,
) -> FoundStep | None:
    """The step that ``wanted`` means, or ``None`` for a fresh start.

    A path is looked at by itself: the run directory is then never read.

    Args:
        wanted: ``latest``, ``auto``, either with the name of one of MiniMind's runs behind it,
            ``best:METRIC:min`` or ``max``, a step's number, a path (also one relative to
            ``run_dir``, or with the other system's separators), ``no``, ``none`` or ``None``.
        run_dir: Where the run keeps its steps.
        verify: Open every form of the step first, down to the headers; ``latest`` and ``best``
            then pass over a damaged one.

    Raises:
        RunError: The step is absent, incomplete or damaged.
        WantedError: It is none of these, or several steps have this number.
        NotACheckpointError: The path does not exist or is no checkpoint.
    """
    if wanted is None:
        return None
    if isinstance(wanted, bool):
        wanted = "latest" if wanted else "no"
    with told(run_dir):
        if isinstance(wanted, int):
            found = _numbered(wanted, run_dir)
        elif isinstance(wanted, str):
            return _said(wanted, run_dir, verify=verify)
        else:
            found = _at_path(typed_path(wanted), run_dir)
        return _complete(_judged(found, verify=verify))


def _said(wanted: str, run_dir: str | os.PathLike[str], *, verify: bool) -> FoundStep | None:
    word = wanted.strip()
    if word.lower() in _NO:
        return None
    first, _, run = word.partition(" ")
    if first.lower() == "auto":
        return find_latest_checkpoint(run_dir, run.strip() or None, verify=verify)
    if first.lower() in _LATEST:
        return _latest(run_dir, run.strip() or None, verify=verify)
    if word.startswith("best:"):
        return _best(Best.parse(word.removeprefix("best:")), run_dir, verify=verify)
    if re.fullmatch(r"[0-9]{1,18}", word) and not _is_lingua_name(word):
        found = _numbered(int(word), run_dir)
    elif word and (_looks_like_path(word) or _exists(word, run_dir)):
        found = _at_path(typed_path(word), run_dir)
    else:
        raise WantedError(
            f"cannot tell which checkpoint {wanted!r} means",
            [("understood", f"{word}: {meaning}") for word, meaning in _UNDERSTOOD],
        )
    return _complete(_judged(found, verify=verify))


def _is_lingua_name(word: str) -> bool:
    """Ten digits name a directory; as a number they would be the same step."""
    return len(word) == 10 and Path(word).is_dir()


def _looks_like_path(word: str) -> bool:
    return "/" in word or "\\" in word or word.startswith(("~", ".")) or Path(word).is_absolute()


def _exists(word: str, run_dir: str | os.PathLike[str]) -> bool:
    return Path(word).exists() or (typed_path(run_dir) / word).exists()


def _latest(run_dir: str | os.PathLike[str], run: str | None, *, verify: bool) -> FoundStep:
    skipped = []
    for step in latest_first(run_dir, run):
        judged = _judged(step, verify=verify)
        if judged.is_complete:
            return step
        skipped.append(("incomplete", f"{step.path.name}: {judged.why_not}"))
    raise RunError(
        "the run has no complete checkpoint",
        [("directory", run_dir), *skipped[:8]],
        hint=f"{command('resolve', run_dir, 'auto')} means a fresh start then",
    )


def _best(best: Best, run_dir: str | os.PathLike[str], *, verify: bool) -> FoundStep:
    """The best step; one that was stripped too, for it is the weights that are best."""
    steps = [step for step in counted(find_checkpoints(run_dir)) if not step.problems]
    metrics = read_metrics(run_dir, steps)
    while True:
        try:
            found, _ = choose_best(best, steps, metrics)
        except DcpconvError as error:
            raise RunError(error.headline, [("directory", run_dir), *error.facts]) from error
        if not verify or not verified(found).problems:
            return found
        steps = [step for step in steps if step.path != found.path]


def _numbered(step: int, run_dir: str | os.PathLike[str]) -> FoundStep:
    names = names_in(run_dir)
    found = [
        look
        for named in names
        if named.step in {step, -1} and (look := look_into(named)) is not None and look.step == step
    ]
    if not found:
        there = sorted({named.step for named in names if named.step >= 0})
        raise RunError(
            f"the run has no step {step}",
            [
                ("directory", run_dir),
                ("found", f"{len(there)} steps, {there[0]} to {there[-1]}" if there else "no step"),
            ],
        )
    if len(found) > 1:
        raise WantedError(
            f"step {step} is there more than once",
            [("found", look.path) for look in sorted(found, key=lambda look: look.order)],
            hint=f"name the path: {command('resolve', run_dir, found[0].path)}",
        )
    return found[0]


def _at_path(path: Path, run_dir: str | os.PathLike[str]) -> FoundStep:
    path = typed_path(path)
    if not path.exists() and not path.is_absolute():
        inside = typed_path(run_dir) / path
        path = inside if inside.exists() else path
    if not path.exists():
        here = typed_path(run_dir) / path.name
        raise NotACheckpointError(
            "there is no such checkpoint",
            [("path", path)],
            hint=f"did you mean {here}?" if path.name and here.exists() else None,
        )
    found = look_at(path)
    if found is None:
        raise NotACheckpointError(
            "this is no checkpoint of a run",
            [
                ("path", path),
                ("expected", "checkpoint-N, a ten-digit name, step-N, checkpoint_N"),
                ("or", "global_stepN, global_step_N, *_resume.pth"),
                ("or", "a directory with trainer_state.json or .metadata"),
            ],
            hint=(
                f"a directory of steps: {command('list', path)}"
                if path.is_dir() and names_in(path)
                else None
            ),
        )
    return found


def _complete(step: FoundStep) -> FoundStep:
    has_name = step.layout == "minimind" or layout_of(step.path.name) is not None
    others = f"{command('list', step.path.parent)} lists the steps" if has_name else None
    if step.problems:
        raise RunError(
            "the checkpoint is not complete",
            [("path", step.path), *(("problem", problem) for problem in step.problems)],
            hint=others,
        )
    if step.is_stripped:
        raise RunError(
            "the checkpoint was stripped: its weights are there, its optimizer is gone",
            [("path", step.path), ("weights", step.weights)],
            hint=others,
        )
    return step
