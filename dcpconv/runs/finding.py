"""The steps of a run directory: all of them, or from the latest down.

A run directory is read once, each step directory once more, and of its files the ends.  Names
decide what is a step and numbers decide the order: times of files only say when.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.formats import torchfile
from dcpconv.runs.entries import Entry, Place, as_path, as_place, place_of, scanned
from dcpconv.runs.errors import RunError, WantedError, command, in_one_line, told
from dcpconv.runs.layouts import (
    HELD,
    Layout,
    is_minimind_name,
    judge,
    layout_by_contents,
    layout_of,
)
from dcpconv.runs.listing import list_step, text_of, typed_path
from dcpconv.runs.rank_files import TRACKERS, tracked
from dcpconv.stores.remote import RemotePath

INNER: Final = ("checkpoints", "checkpoint")
"""Where Lingua, MiniMind, accelerate and torchtitan put the steps inside a run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundStep:
    """One checkpoint of a run.

    Attributes:
        step: Its number; ``None`` where a path was given that does not say.
        path: The directory, or MiniMind's file.
        layout: Whose directory it is.
        form: How its weights are stored; ``None`` where no form of ours holds them.
        weights: What ``open_checkpoint`` opens for the weights.
        holds: What it has, of ``weights``, ``adapter``, ``optimizer``, ``scheduler``, ``scaler``,
            ``rng`` and ``trainer state``.
        problems: Why it is not complete, one sentence each.
        nbytes: Bytes of all its files.
        modified: When its youngest file changed, in seconds since 1970.
        epoch: Of a MiniMind file, whose steps start again with every epoch; else 0.
        is_link: Whether a symbolic link leads to it.
        is_stripped: Whether its optimizer was deleted on purpose.
        target: Where the link leads, with the path of a neighbour where it is one.
    """

    step: int | None
    path: Path
    layout: Layout
    form: Form | None
    weights: Path
    holds: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    nbytes: int = 0
    modified: float = 0.0
    epoch: int = 0
    is_link: bool = False
    is_stripped: bool = False
    target: Path | None = None

    @property
    def is_complete(self) -> bool:
        """Whether a run can go on from here."""
        return not self.problems and not self.is_stripped

    @property
    def why_not(self) -> str:
        """Why a run cannot go on from here, in one line."""
        stripped = ["it was stripped: its optimizer is gone"] if self.is_stripped else []
        return "; ".join([*self.problems, *stripped])

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorts steps: by epoch and number, never by time."""
        return (self.epoch, -1 if self.step is None else self.step, self.path.name)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "path": str(self.path),
            "layout": self.layout,
            "form": self.form,
            "weights": str(self.weights),
            "complete": self.is_complete,
            "stripped": self.is_stripped,
            "problems": list(self.problems),
            "holds": list(self.holds),
            "nbytes": self.nbytes,
            "modified": when(self.modified),
        }


def when(seconds: float) -> str | None:
    """A time since 1970 as text; ``None`` for one that no calendar has."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
    except (ValueError, OverflowError, OSError):
        return None


@dataclass(frozen=True, slots=True)
class Named:
    """A name in a run directory that is a step, not looked into yet."""

    path: Place
    name: str
    layout: Layout
    step: int
    is_link: bool
    problems: tuple[str, ...] = ()


def find_checkpoints(run_dir: str | os.PathLike[str]) -> tuple[FoundStep, ...]:
    """Every step of a run, complete or not, in the order of their numbers.

    Steps are looked for in ``run_dir``, else in its ``checkpoints`` or ``checkpoint`` directory.

    Args:
        run_dir: Where a run keeps its steps; a directory that does not exist has none.

    Raises:
        NotACheckpointError: ``run_dir`` is a file, or cannot be read.
    """
    found = [step for named in names_in(run_dir) if (step := look_into(named)) is not None]
    return tuple(sorted(found, key=lambda step: step.order))


def latest_first(run_dir: str | os.PathLike[str], run: str | None = None) -> Iterator[FoundStep]:
    """Steps from the highest number down, each looked into only when it is asked for.

    Args:
        run_dir: Where a run keeps its steps.
        run: Which of several runs of MiniMind: ``pretrain`` or ``pretrain_512``.

    Raises:
        NotACheckpointError: ``run_dir`` is a file, or cannot be read.
        RunError: There is no such run.
        WantedError: MiniMind files of several runs lie in ``run_dir``: which is meant?
    """
    names = names_in(run_dir)
    files = sorted(named.name for named in names if named.layout == "minimind")
    if run is not None:
        names = [named for named in names if _is_of_run(named, run)]
        if not names:
            raise RunError(
                f"no run {run!r} has a resume file here",
                [("directory", run_dir), *(("found", _run_of(name)) for name in files)],
                hint=command("latest", run_dir, _run_of(files[0])) if files else None,
            )
    several = sorted(_run_of(named.name) for named in names if named.layout == "minimind")
    if len(several) > 1:
        raise WantedError(
            "resume files of several runs lie here, and their steps do not compare",
            [("directory", run_dir), *(("found", name) for name in several)],
            hint=f"name one: {command('latest', run_dir, several[0])}",
        )
    names.sort(key=lambda named: (named.step, named.name), reverse=True)
    return (step for named in names if (step := look_into(named)) is not None)


def _run_of(name: str) -> str:
    return name.removesuffix("_resume.pth")


def _is_of_run(named: Named, run: str) -> bool:
    if named.layout != "minimind":
        return False
    return run in {named.name, own := _run_of(named.name)} or (
        # MiniMind puts the width behind the name, and _moe behind that.
        re.fullmatch(re.escape(run) + r"_[0-9]+(_moe)?", own) is not None
    )


def names_in(run_dir: str | os.PathLike[str]) -> list[Named]:
    """What is a step by its name, in the order of the directory.

    Raises:
        NotACheckpointError: ``run_dir`` is a file, or cannot be read.
    """
    with told(run_dir):
        directory = typed_path(run_dir)
        names, inner = _scan(directory, is_link=False)
        for name in INNER:
            if not names and name in inner:
                names, _ = _scan(directory / name, is_link=inner[name])
        return names


def _scan(directory: Path, *, is_link: bool) -> tuple[list[Named], dict[str, bool]]:
    names: list[Named] = []
    inner: dict[str, bool] = {}
    trackers: dict[str, bytes] = {}
    try:
        with scanned(directory) as entries:
            for entry in entries:
                with suppress(OSError):  # a link in a circle, or to where we may not look
                    named = _named(entry, is_link=is_link)
                    if named is not None:
                        names.append(named)
                    elif entry.name in INNER and entry.is_dir():
                        inner[entry.name] = entry.is_symlink()
                    elif entry.name in TRACKERS and entry.is_file():
                        trackers[entry.name] = text_of(as_path(place_of(entry)))
    except FileNotFoundError:
        return [], {}
    except NotADirectoryError as error:
        raise NotACheckpointError(
            "a run directory is expected, this is a file", [("path", directory)]
        ) from error
    return _with_trackers(names, trackers), inner


def _named(entry: Entry, *, is_link: bool) -> Named | None:
    known = layout_of(entry.name)
    if known is not None and entry.is_dir():
        return Named(place_of(entry), entry.name, *known, is_link or entry.is_symlink())
    if is_minimind_name(entry.name) and entry.is_file():
        return Named(place_of(entry), entry.name, "minimind", -1, is_link or entry.is_symlink())
    return None


def _with_trackers(names: list[Named], trackers: dict[str, bytes]) -> list[Named]:
    """Steps that their trainer has not finished: it names the newest in a file beside them."""
    finished = {layout: (file, step) for layout, file, step in tracked(trackers)}
    found = []
    for named in names:
        file, newest = finished.get(named.layout, ("", -1))
        if newest is None:
            why = f"no {file} with the number of a step lies beside it: the trainer writes it last"
            found.append(replace(named, problems=(why,)))
        elif file and named.step > newest:
            why = f"{file} says {newest}: the save was interrupted"
            found.append(replace(named, problems=(why,)))
        else:
            found.append(named)
    return found


def look_into(named: Named) -> FoundStep | None:
    """What a step holds; ``None`` where it has disappeared meanwhile.

    Whatever its files are, the step is one line of a list and never the end of it.
    """
    path = as_path(named.path)
    try:
        if named.layout == "minimind":
            return look_at_file(path, is_link=named.is_link)
        return _look(named)
    except Exception as error:  # noqa: BLE001  files of strangers; the other steps still count
        if not isinstance(path, RemotePath) and not os.path.lexists(named.path):
            return None
        return FoundStep(
            step=named.step if named.step >= 0 else None,
            path=path,
            layout=named.layout,
            form=None,
            weights=path,
            problems=(f"it cannot be read ({in_one_line(error)})",),
            is_link=named.is_link,
            target=_target(path) if named.is_link else None,
        )


def _target(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    is_near = target.parent == Path(os.path.realpath(path.parent))
    return path.with_name(target.name) if is_near else target


def look_at(path: Path) -> FoundStep | None:
    """What a path that the user named holds; ``None`` where it is no step of any layout.

    Only the step itself is read, never what lies around it.

    Raises:
        OSError: It cannot be read.
    """
    is_link = path.is_symlink()
    if path.is_file():
        return look_at_file(path, is_link=is_link) if torchfile.is_torch_file(path) else None
    if not path.is_dir():
        return None
    known = layout_of(path.resolve().name if path.name in {"", ".", ".."} else path.name)
    if known is not None:
        return look_into(Named(as_place(path), path.name, *known, is_link))
    layout = layout_by_contents(list_step(as_place(path)))
    if layout is None:
        return None
    return look_into(Named(as_place(path), path.name, layout, -1, is_link))


def _look(named: Named) -> FoundStep:
    listing = list_step(named.path)
    judged = judge(named.layout, listing)
    path = as_path(named.path)
    return FoundStep(
        step=named.step if named.step >= 0 else None,
        path=path,
        layout=named.layout,
        form=judged.form,
        weights=path / judged.weights if judged.weights else path,
        holds=judged.holds,
        problems=(*judged.problems, *named.problems),
        nbytes=listing.nbytes,
        modified=listing.modified,
        is_link=named.is_link,
        is_stripped=judged.is_stripped,
        target=_target(path) if named.is_link else None,
    )


def look_at_file(path: Path, *, is_link: bool) -> FoundStep:
    """What a MiniMind resume file holds; its step is inside it.

    Raises:
        FileNotFoundError: It has disappeared meanwhile.
    """
    stat = path.stat()
    problems: list[str] = []
    holds: set[str] = set()
    step: int | None = None
    epoch = 0
    try:
        catalog = torchfile.read_catalog(path)
    except DcpconvError as error:
        problems.append(error.headline)
    except Exception as error:  # noqa: BLE001  a pickle of strangers
        problems.append(f"it cannot be read ({in_one_line(error)})")
    else:
        objects = catalog.objects
        tops = {str(catalog.path_of(key)[0]) for key in (*catalog.tensors, *objects)}
        holds = {name for name in HELD if name in tops}
        holds |= {"weights"} if "model" in tops else set()
        holds |= {"trainer state"} if "step" in objects else set()
        holds -= {"scaler"} if not any(key.startswith("scaler.") for key in objects) else set()
        problems += [f"it holds no {key}" for key in ("model", "optimizer") if key not in tops]
        step, epoch = _number(objects.get("step")), _number(objects.get("epoch")) or 0
        if step is None:
            problems.append("it holds no step")
    return FoundStep(
        step=step,
        path=path,
        layout="minimind",
        form="torch",
        weights=path,
        holds=tuple(name for name in HELD if name in holds),
        problems=tuple(problems),
        nbytes=stat.st_size,
        modified=stat.st_mtime,
        epoch=epoch,
        is_link=is_link,
        target=_target(path) if is_link else None,
    )


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
