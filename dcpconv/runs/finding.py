"""The steps of a run directory: all of them, or the latest that is complete.

A run directory is read once; each step directory once more.  Names decide what is a step and
numbers decide the order: times of files only say when.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.formats import torchfile
from dcpconv.runs.layouts import (
    HELD,
    Layout,
    is_minimind_name,
    judge,
    layout_by_contents,
    layout_of,
)
from dcpconv.runs.listing import list_step, typed_path

_INNER: Final = ("checkpoints", "checkpoint")
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
        holds: What it has, of ``weights``, ``optimizer``, ``scheduler``, ``scaler``, ``rng`` and
            ``trainer state``.
        problems: Why it is not complete, one sentence each.
        nbytes: Bytes of all its files.
        modified: When its youngest file changed, in seconds since 1970.
        epoch: Of a MiniMind file, whose steps start again with every epoch; else 0.
        is_link: Whether a symbolic link leads to it.
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

    @property
    def is_complete(self) -> bool:
        """Whether a run can go on from here."""
        return not self.problems

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
            "problems": list(self.problems),
            "holds": list(self.holds),
            "nbytes": self.nbytes,
            "modified": datetime.fromtimestamp(self.modified, timezone.utc).isoformat(),
        }


@dataclass(frozen=True, slots=True)
class Named:
    """A name in a run directory that is a step, not looked into yet."""

    path: str
    name: str
    layout: Layout
    step: int
    is_link: bool


def find_checkpoints(run_dir: str | os.PathLike[str]) -> tuple[FoundStep, ...]:
    """Every step of a run, complete or not, in the order of their numbers.

    Steps are looked for in ``run_dir``, else in its ``checkpoints`` or ``checkpoint`` directory.

    Args:
        run_dir: Where a run keeps its steps; a directory that does not exist has none.

    Raises:
        NotACheckpointError: ``run_dir`` is a file.
    """
    found = [step for named in names_in(run_dir) if (step := look_into(named)) is not None]
    return tuple(sorted(found, key=lambda step: step.order))


def find_latest_checkpoint(run_dir: str | os.PathLike[str]) -> FoundStep | None:
    """The complete step with the highest number, or ``None`` where there is none.

    Raises:
        NotACheckpointError: ``run_dir`` is a file.
        DcpconvError: MiniMind files of several runs lie in ``run_dir``: which is meant?
    """
    for step in latest_first(run_dir):
        if step.is_complete:
            return step
    return None


def latest_first(run_dir: str | os.PathLike[str]) -> Iterator[FoundStep]:
    """Steps from the highest number down, each looked into only when it is asked for.

    Raises:
        NotACheckpointError: ``run_dir`` is a file.
        DcpconvError: MiniMind files of several runs lie in ``run_dir``.
    """
    names = names_in(run_dir)
    files = [named.name for named in names if named.layout == "minimind"]
    if len(files) > 1:
        raise DcpconvError(
            "resume files of several runs lie here, and their steps do not compare",
            [("directory", run_dir), *(("found", name) for name in sorted(files))],
            hint="name the file",
        )
    names.sort(key=lambda named: (named.step, named.name), reverse=True)
    return (step for named in names if (step := look_into(named)) is not None)


def names_in(run_dir: str | os.PathLike[str]) -> list[Named]:
    """What is a step by its name, in the order of the directory.

    Raises:
        NotACheckpointError: ``run_dir`` is a file.
    """
    directory = typed_path(run_dir)
    names, inner = _scan(directory, is_link=False)
    for name in _INNER:
        if not names and name in inner:
            names, _ = _scan(directory / name, is_link=inner[name])
    return names


def _scan(directory: Path, *, is_link: bool) -> tuple[list[Named], dict[str, bool]]:
    names: list[Named] = []
    inner: dict[str, bool] = {}
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                known = layout_of(entry.name)
                if known is not None and entry.is_dir():
                    link = is_link or entry.is_symlink()
                    names.append(Named(entry.path, entry.name, *known, link))
                elif is_minimind_name(entry.name) and entry.is_file():
                    link = is_link or entry.is_symlink()
                    names.append(Named(entry.path, entry.name, "minimind", -1, link))
                elif entry.name in _INNER and entry.is_dir():
                    inner[entry.name] = entry.is_symlink()
    except FileNotFoundError:
        return [], {}
    except NotADirectoryError as error:
        raise NotACheckpointError(
            "a run directory is expected, this is a file", [("path", directory)]
        ) from error
    return names, inner


def look_into(named: Named) -> FoundStep | None:
    """What a step holds; ``None`` where it has disappeared meanwhile."""
    try:
        if named.layout == "minimind":
            return look_at_file(Path(named.path), is_link=named.is_link)
        return _look(named)
    except FileNotFoundError:
        return None


def look_at(path: Path) -> FoundStep | None:
    """What a path that the user named holds; ``None`` where it is no step of any layout.

    Only the step itself is read, never what lies around it.

    Raises:
        OSError: It cannot be read.
    """
    is_link = path.is_symlink()
    if path.is_file():
        return look_at_file(path, is_link=is_link) if torchfile.is_torch_file(path) else None
    known = layout_of(path.resolve().name if path.name in {"", ".", ".."} else path.name)
    if known is not None:
        return _look(Named(str(path), path.name, *known, is_link))
    layout = layout_by_contents(list_step(str(path)))
    if layout is None:
        return None
    return _look(Named(str(path), path.name, layout, -1, is_link))


def _look(named: Named) -> FoundStep:
    listing = list_step(named.path)
    judged = judge(named.layout, listing)
    path = Path(named.path)
    return FoundStep(
        step=named.step if named.step >= 0 else None,
        path=path,
        layout=named.layout,
        form=judged.form,
        weights=path / judged.weights if judged.weights else path,
        holds=judged.holds,
        problems=judged.problems,
        nbytes=listing.nbytes,
        modified=listing.modified,
        is_link=named.is_link,
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
    )


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
