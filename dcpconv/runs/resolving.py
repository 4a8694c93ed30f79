"""Turns what a user wrote after ``--resume`` into one step, or says what would be understood."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.runs.finding import (
    FoundStep,
    find_latest_checkpoint,
    latest_first,
    look_at,
    look_into,
    names_in,
)
from dcpconv.runs.listing import typed_path

_NO: Final = frozenset({"no", "none", "false"})
_LATEST: Final = frozenset({"latest", "last", "yes", "true"})
_UNDERSTOOD: Final = (
    ("latest", "the complete step with the highest number; an error where there is none"),
    ("auto", "the same, or a fresh start where there is none"),
    ("a number", "that step"),
    ("a path", "that step, wherever it is"),
    ("no, none", "a fresh start"),
)


class RunError(DcpconvError, ValueError):
    """The step that was asked for is not there, or not complete."""

    exit_code = 1


class WantedError(RunError):
    """Which step was asked for cannot be told: not understood, or there are several."""

    exit_code = 2


def resolve_checkpoint(
    wanted: str | int | os.PathLike[str] | None, run_dir: str | os.PathLike[str]
) -> FoundStep | None:
    """The step that ``wanted`` means, or ``None`` for a fresh start.

    A path is looked at by itself: the run directory is then never read.

    Args:
        wanted: ``latest``, ``auto``, a step's number, a path (also one relative to ``run_dir``, or
            with the other system's separators), ``no``, ``none`` or ``None``.
        run_dir: Where the run keeps its steps.

    Raises:
        RunError: The step is absent or incomplete.
        WantedError: It is none of these, or several steps have this number.
        NotACheckpointError: The path does not exist or is no checkpoint.
    """
    if wanted is None:
        return None
    if isinstance(wanted, bool):
        wanted = "latest" if wanted else "no"
    if isinstance(wanted, int):
        return _numbered(wanted, run_dir)
    if not isinstance(wanted, str):
        return _at_path(Path(wanted), run_dir)
    word = wanted.strip()
    if word.lower() in _NO:
        return None
    if word.lower() == "auto":
        return find_latest_checkpoint(run_dir)
    if word.lower() in _LATEST:
        return _latest(run_dir)
    if re.fullmatch(r"[0-9]{1,18}", word) and not _is_lingua_name(word):
        return _numbered(int(word), run_dir)
    if word and (_looks_like_path(word) or _exists(word, run_dir)):
        return _at_path(typed_path(word), run_dir)
    raise WantedError(
        f"cannot tell which checkpoint {wanted!r} means",
        [("understood", f"{word}: {meaning}") for word, meaning in _UNDERSTOOD],
    )


def _is_lingua_name(word: str) -> bool:
    """Ten digits name a directory; as a number they would be the same step."""
    return len(word) == 10 and Path(word).is_dir()


def _looks_like_path(word: str) -> bool:
    return "/" in word or "\\" in word or word.startswith(("~", ".")) or Path(word).is_absolute()


def _exists(word: str, run_dir: str | os.PathLike[str]) -> bool:
    return Path(word).exists() or (typed_path(run_dir) / word).exists()


def _latest(run_dir: str | os.PathLike[str]) -> FoundStep:
    skipped = []
    for step in latest_first(run_dir):
        if step.is_complete:
            return step
        skipped.append(("incomplete", f"{step.path.name}: {'; '.join(step.problems)}"))
    raise RunError(
        "the run has no complete checkpoint",
        [("directory", run_dir), *skipped[:8]],
        hint="auto starts afresh where there is none",
    )


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
            hint="name the path",
        )
    return _complete(found[0])


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
                ("expected", "checkpoint-N, a ten-digit name, step-N, checkpoint_N, *_resume.pth"),
                ("or", "a directory with trainer_state.json or .metadata"),
            ],
            hint="for the latest step in a run directory say latest" if path.is_dir() else None,
        )
    return _complete(found)


def _complete(step: FoundStep) -> FoundStep:
    if step.problems:
        raise RunError(
            "the checkpoint is not complete",
            [("path", step.path), *(("problem", problem) for problem in step.problems)],
            hint="take another step: `dcpconv runs list` shows which are complete",
        )
    return step
