"""Deletes steps that a retention does not keep, so that an interruption breaks none of the rest.

What is to stay is opened before anything is deleted: a step that does not verify counts for
nothing.  No step is deleted that a link needs.

A step first gets a hidden name, in one rename; only then are its files deleted.  At every moment a
step is either whole under its own name or no step at all.  What an interrupted pruning left under
hidden names, the next one removes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dcpconv.core.errors import DcpconvError
from dcpconv.runs.errors import in_one_line, told
from dcpconv.runs.finding import FoundStep, find_checkpoints
from dcpconv.runs.layouts import layout_of
from dcpconv.runs.links import Link, find_links, needed
from dcpconv.runs.listing import typed_path
from dcpconv.runs.metrics import read_metrics
from dcpconv.runs.retention import Decision, Retention
from dcpconv.runs.verifying import verified
from dcpconv.stores.schemes import refuse_scheme

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
        NotACheckpointError: ``run_dir`` is a file, or something in it cannot be read.
        DcpconvError: A metric is nowhere to be found; a step changed under our hands; or something
            cannot be deleted: it then is no step any more, and the rest is whole.
    """
    refuse_scheme(run_dir)
    with told(run_dir):
        steps = find_checkpoints(run_dir)
        links = find_links(run_dir)
    metrics = read_metrics(run_dir, steps) if retention.keep_best else {}
    decision = _decide(retention, list(steps), metrics, links)
    if yes:
        for directory in {step.path.parent for step in steps} | {typed_path(run_dir)}:
            _empty_trash(directory)
        for step in decision.removed:
            _remove(step)
    return Pruning(decision, yes)


def _decide(
    retention: Retention,
    steps: list[FoundStep],
    metrics: Mapping[int, Mapping[str, float]],
    links: Collection[Link],
) -> Decision:
    """A decision in which everything that counts was opened, and nothing goes that a link needs."""
    opened: set[Path] = set()
    linked: set[Path] = set()
    while True:
        decision = retention.decide(steps, metrics, linked=linked)
        kept = {row.step.path for row in decision.kept if row.step.is_complete} - opened
        if kept:
            steps = [verified(step) if step.path in kept else step for step in steps]
            opened |= kept
            continue
        more = needed(links, decision.removed)
        if not more:
            return decision
        linked |= more


def _remove(step: FoundStep) -> None:
    if step.path.is_symlink() or not step.path.is_dir():
        raise DcpconvError("the step is no longer a directory of its own", [("path", step.path)])
    trash = step.path.with_name(f".{step.path.name}{_SUFFIX}")
    try:
        step.path.rename(trash)
    except OSError as error:
        raise DcpconvError(
            "the step cannot be deleted; nothing of it was touched",
            [("path", step.path), ("because", in_one_line(error))],
        ) from error
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
    try:
        shutil.rmtree(trash)
    except OSError as error:
        raise DcpconvError(
            "what was renamed cannot be deleted; every step under its own name is whole",
            [("path", error.filename or trash), ("because", in_one_line(error))],
            hint="the next prune --yes goes on with it",
        ) from error
