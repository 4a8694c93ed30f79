"""Deletes the optimizers of finished steps and keeps their weights.

A step first gets a mark, in one rename, and from then on it is a step that has only weights; after
that its optimizer's files are deleted.  At every moment a step is whole or marked, and its weights
are never touched.  What an interruption left, the next stripping deletes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dcpconv.core.errors import DcpconvError
from dcpconv.runs import rank_files
from dcpconv.runs.errors import in_one_line, told
from dcpconv.runs.finding import FoundStep, find_checkpoints
from dcpconv.runs.layouts import STRIPPED, Layout
from dcpconv.runs.links import Link, find_links, needed_elsewhere
from dcpconv.runs.listing import Listing, list_step
from dcpconv.runs.retention import counted
from dcpconv.runs.verifying import verified
from dcpconv.stores.schemes import refuse_scheme

_FILES: Final[dict[Layout, frozenset[str]]] = {
    "hf-trainer": frozenset({"optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"}),
    "accelerate": frozenset({"optimizer.bin", "scheduler.bin", "scaler.pt"}),
    "verl": frozenset(),
}
"""Optimizers, and what is of no use without them; layouts that are not here keep all in one."""

_WHY_LEFT: Final[dict[Layout, str]] = {
    "minimind": "optimizer and weights are one file",
    "lingua": "optimizer and weights share files",
    "torchtitan": "optimizer and weights share files",
    "dcp": "optimizer and weights share files",
    "deepspeed": "the fp32 weights are in the optimizer's files",
}


@dataclass(frozen=True, slots=True)
class Stripped:
    """A step whose optimizer goes.

    Attributes:
        step: The step.
        names: Files and directories to delete, relative to it.
        nbytes: Bytes of all of them.
    """

    step: FoundStep
    names: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stripping:
    """What stripping did, or would do.

    Attributes:
        stripped: Steps whose optimizer goes, in the order of their numbers.
        left: Steps that stay as they are, each with the reason.
        is_done: Whether it was deleted.
    """

    stripped: tuple[Stripped, ...]
    left: tuple[tuple[FoundStep, str], ...]
    is_done: bool

    @property
    def nbytes(self) -> int:
        """Bytes of what goes."""
        return sum(row.nbytes for row in self.stripped)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "deleted": self.is_done,
            "nbytes": self.nbytes,
            "stripped": [
                {"path": str(row.step.path), "files": list(row.names), "nbytes": row.nbytes}
                for row in self.stripped
            ],
            "left": [{"path": str(step.path), "reason": reason} for step, reason in self.left],
        }


def strip(run_dir: str | os.PathLike[str], *, keep_last: int = 1, yes: bool = False) -> Stripping:
    """Deletes the optimizer files of all complete steps but the newest.

    Args:
        run_dir: Where the run keeps its steps.
        keep_last: The newest so many complete steps that stay whole; at least 1.
        yes: Delete; without it nothing is touched.

    Raises:
        NotACheckpointError: ``run_dir`` is a file, or something in it cannot be read.
        DcpconvError: ``keep_last`` is below 1, or something cannot be deleted.
    """
    if keep_last < 1:
        raise DcpconvError(
            "the newest step keeps its optimizer, or the run could not go on",
            [("expected", "keep_last of at least 1"), ("found", keep_last)],
        )
    refuse_scheme(run_dir)
    with told(run_dir):
        steps = find_checkpoints(run_dir)
        links = find_links(run_dir)
        stripping = _decide(steps, links, keep_last, yes=yes)
    if yes:
        for row in stripping.stripped:
            _carry_out(row)
    return stripping


def _decide(
    steps: Iterable[FoundStep], links: Collection[Link], keep_last: int, *, yes: bool
) -> Stripping:
    steps = [verified(step) for step in steps]
    whole = [step for step in counted(steps) if step.is_complete]
    newest = {step.path for step in whole[-keep_last:]}
    newest |= {step.target for step in whole[-keep_last:] if step.target}
    linked = needed_elsewhere(links, steps)
    stripped: list[Stripped] = []
    left: list[tuple[FoundStep, str]] = []
    for step in steps:
        rows = _rows(list_step(str(step.path)), step.layout) if step.path.is_dir() else ((), 0)
        reason = _why_left(step, rows[0], newest, linked)
        if reason:
            left.append((step, reason))
        else:
            stripped.append(Stripped(step, *rows))
    return Stripping(tuple(stripped), tuple(left), yes)


def _why_left(
    step: FoundStep, names: Collection[str], newest: Collection[Path], linked: Collection[Path]
) -> str | None:
    if step.problems:
        return "incomplete"
    if step.is_link:
        return "symbolic link"
    if step.path in newest:
        return "newest"
    if step.path in linked and not step.is_stripped:
        return "linked"
    if step.layout not in _FILES:
        return _WHY_LEFT[step.layout]
    is_apart = step.layout == "verl" or any(map(rank_files.OPTIMIZER_OF_RANK.fullmatch, names))
    if step.form in {None, "ranks"} and not is_apart and not step.is_stripped:
        return "its weights are in the optimizer's files"
    if not names:
        return "stripped" if step.is_stripped else "no optimizer of its own"
    return None


def _rows(listing: Listing, layout: Layout) -> tuple[tuple[str, ...], int]:
    """What goes of a step: files, and whole directories with a slash at their end."""
    wanted = _FILES.get(layout, frozenset())
    names: list[str] = []
    nbytes = 0
    real = os.path.realpath(listing.path)
    for name, size in listing.files.items():
        top, slash, _ = name.partition("/")
        if slash and _is_behind_link(f"{real}/{name}"):
            continue  # behind a link: not of this step alone
        if name in wanted or rank_files.is_optimizer_file(name):
            names.append(name)
        elif slash and top.startswith("optimizer_") and layout in {"hf-trainer", "accelerate"}:
            names.append(f"{top}/")
        else:
            continue
        nbytes += size
    return tuple(sorted(set(names))), nbytes


def _is_behind_link(file: str) -> bool:
    parent = Path(file).parent
    return parent != Path(os.path.realpath(parent))


def _carry_out(row: Stripped) -> None:
    path = row.step.path
    try:
        if path.is_symlink() or not path.is_dir():
            raise DcpconvError("the step is no longer a directory of its own", [("path", path)])
        _mark(path, row.names)
        for name in row.names:
            place = path / name
            if name.endswith("/") and not place.is_symlink():
                shutil.rmtree(place)
            else:
                (path / name.rstrip("/")).unlink(missing_ok=True)
    except OSError as error:
        raise DcpconvError(
            "the optimizer cannot be deleted; the weights of every step are untouched",
            [("path", error.filename or path), ("because", in_one_line(error))],
            hint="the next strip --yes goes on with it",
        ) from error


def _mark(path: Path, names: Collection[str]) -> None:
    """Writes the mark, whole or not at all, and safe on disk before anything is deleted."""
    mark = path / STRIPPED
    if mark.is_file():
        return
    staged = path / f".{STRIPPED}.tmp"
    with staged.open("w", encoding="utf-8") as file:
        json.dump({"deleted": sorted(names)}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    staged.replace(mark)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
