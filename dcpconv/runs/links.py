"""Symbolic links of a run directory, and the steps that must stay because a link needs them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcpconv.runs.finding import INNER, FoundStep
from dcpconv.runs.listing import typed_path

_HOPS: Final = 40
"""Links after one another that a system follows at most."""


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link.

    Attributes:
        path: Where it lies, without links in front.
        needs: Every place on its way: what it names, what that names, and the end.
    """

    path: Path
    needs: frozenset[Path]


def find_links(run_dir: str | os.PathLike[str]) -> tuple[Link, ...]:
    """Every link in a run directory and below it, also beside a directory of steps inside one.

    Raises:
        OSError: A directory cannot be read, so that nobody knows what its links need.
    """
    directory = _real(typed_path(run_dir))
    found = list(_below(directory))
    if directory.name in INNER:
        with os.scandir(directory.parent) as entries:
            found += [_follow(Path(entry.path)) for entry in entries if entry.is_symlink()]
    return tuple(found)


def _below(root: Path) -> Iterator[Link]:
    ahead = [str(root)]
    while ahead:
        try:
            entries = os.scandir(ahead.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue  # gone since its name was read
        with entries:
            for entry in entries:
                if entry.is_symlink():
                    yield _follow(Path(entry.path))
                elif entry.is_dir(follow_symlinks=False):
                    ahead.append(entry.path)


def _follow(path: Path) -> Link:
    needs = {_real(path)}
    here = path
    for _ in range(_HOPS):
        try:
            text = here.readlink()
        except OSError:
            break
        there = Path(os.path.normpath(here.parent / text))
        # The directory of a link may itself be reached through one; what counts is where it lies.
        here = _real(there.parent) / there.name
        needs |= {there, here}
    return Link(path, frozenset(needs))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def needed(links: Iterable[Link], going: Collection[FoundStep]) -> set[Path]:
    """Which of the steps that are to go a link leads into that stays.

    Args:
        links: Of the run.
        going: Steps to delete; links inside them go as well.
    """
    places = {_real(step.path): step.path for step in going}
    found = set()
    for link in links:
        if _inside(link.path, places) is None:
            found |= {place for need in link.needs if (place := _inside(need, places)) is not None}
    return {places[place] for place in found}


def needed_elsewhere(links: Iterable[Link], steps: Collection[FoundStep]) -> set[Path]:
    """Which steps a link leads into that lies outside of them."""
    places = {_real(step.path): step.path for step in steps}
    found = set()
    for link in links:
        own = _inside(link.path, places)
        found |= {_inside(need, places) for need in link.needs} - {own, None}
    return {path for place, path in places.items() if place in found}


def _inside(path: Path, places: Collection[Path]) -> Path | None:
    """The one of ``places`` that is ``path`` or a directory above it."""
    return next((place for place in (path, *path.parents) if place in places), None)
