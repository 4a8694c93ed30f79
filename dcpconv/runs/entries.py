"""What lies right in a directory, of this machine or of a store, with one look at it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dcpconv.stores.remote import RemotePath

Place = str | RemotePath
"""A directory: its name, or its path in a store with what was listed there."""

Entry = os.DirEntry[str] | RemotePath
"""Has a name, says what it is, and can be looked at more closely with ``stat``."""


@contextmanager
def scanned(directory: Path | Place) -> Iterator[Iterable[Entry]]:
    """The entries of a directory.

    Raises:
        OSError: It is absent, no directory, or cannot be read.
    """
    if not isinstance(directory, RemotePath):
        with os.scandir(directory) as entries:
            yield entries
        return
    if not directory.is_dir():
        if directory.is_file():
            raise NotADirectoryError(20, "it is an object, not a prefix of some", str(directory))
        raise FileNotFoundError(2, "there is nothing of this name", str(directory))
    yield directory.iterdir()


def place_of(entry: Entry) -> Place:
    """Where an entry is."""
    return entry if isinstance(entry, RemotePath) else entry.path


def as_place(path: Path) -> Place:
    """A path, for a listing."""
    return path if isinstance(path, RemotePath) else str(path)


def as_path(place: Place) -> Path:
    """The path of a place."""
    return place if isinstance(place, RemotePath) else Path(place)
