"""Deletes steps that a retention does not keep, so that an interruption breaks none of the rest.

A step first gets a hidden name, in one rename; only then are its files deleted.  At every moment a
step is either whole under its own name or no step at all.  What an interrupted pruning left under
hidden names, the next one removes.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dcpconv.core.errors import DcpconvError
from dcpconv.runs.finding import FoundStep, find_checkpoints
from dcpconv.runs.layouts import layout_of
from dcpconv.runs.listing import typed_path
from dcpconv.runs.metrics import read_metrics
from dcpconv.runs.retention import Decision, Retention

_SUFFIX: Final = ".dcpconv-trash"
_TRASH = re.compile(r"\.(.+)" + re.escape(_SUFFIX))


@dataclass(frozen=True, slots=True)
class Pruning:
    """What pruning did, or would do.

    Attributes:
        decision: What stays, why, and what goes.
        is_done: Whether it was deleted.
    """

    decision: Decision
    is_done: bool

    @property
    def nbytes(self) -> int:
        """Bytes of what goes."""
        return sum(step.nbytes for step in self.decision.removed)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "deleted": self.is_done,
            "nbytes": self.nbytes,
            "removed": [step.to_json() for step in self.decision.removed],
            "kept": [
                {**kept.step.to_json(), "reasons": list(kept.reasons)}
                for kept in self.decision.kept
            ],
            "notes": list(self.decision.notes),
        }


def prune(run_dir: str | os.PathLike[str], retention: Retention, *, yes: bool = False) -> Pruning:
    """Deletes the complete steps of a run that ``retention`` does not keep.

    Args:
        run_dir: Where the run keeps its steps.
        retention: What to keep.
        yes: Delete; without it nothing is touched.

    Raises:
        DcpconvError: A metric is nowhere to be found, or a step changed under our hands.
        OSError: Something cannot be deleted; it then is no step any more, and the rest is whole.
    """
    steps = find_checkpoints(run_dir)
    metrics = read_metrics(run_dir, steps) if retention.keep_best else {}
    decision = retention.decide(steps, metrics)
    if yes:
        for directory in {step.path.parent for step in steps} | {typed_path(run_dir)}:
            _empty_trash(directory)
        for step in decision.removed:
            _remove(step)
    return Pruning(decision, yes)


def _remove(step: FoundStep) -> None:
    if step.path.is_symlink() or not step.path.is_dir():
        raise DcpconvError("the step is no longer a directory of its own", [("path", step.path)])
    trash = step.path.with_name(f".{step.path.name}{_SUFFIX}")
    step.path.rename(trash)
    _delete(trash)


def _empty_trash(directory: Path) -> None:
    """Deletes what an interrupted pruning left; only names that we give."""
    if not directory.is_dir():
        return
    with os.scandir(directory) as entries:
        left = [
            Path(entry.path)
            for entry in entries
            if (match := _TRASH.fullmatch(entry.name))
            and layout_of(match.group(1))
            and entry.is_dir(follow_symlinks=False)
        ]
    for trash in left:
        _delete(trash)


def _delete(trash: Path) -> None:
    # Links inside are unlinked, not followed: rmtree's promise.
    shutil.rmtree(trash)
