"""What lies in one step directory: names, bytes and times, with one look per directory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

METADATA: Final = ".metadata"

_DEEPEST: Final = 4
"""Directories below a step: none of the layouts nests deeper, and a link may lead in a circle."""

_LISTED: Final = 8
"""Missing ranks that are named; who lost more has lost the step anyway."""

_DISTCP = re.compile(rb"__[0-9]+_[0-9]+\.distcp")
_RANK = re.compile(r"__([0-9]{1,9})_[0-9]+\.distcp")


@dataclass(slots=True)
class Listing:
    """Files below one directory.

    Attributes:
        path: The directory.
        files: Bytes of every file by its relative name, with ``/`` between the parts.
        directories: Names directly inside ``path``.
        modified: When the youngest file changed, in seconds since 1970.
    """

    path: str
    files: dict[str, int] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)
    modified: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def read(self, name: str, *, last: int | None = None) -> bytes:
        """The bytes of one file, or only its ``last``; empty where it cannot be read."""
        nbytes = self.files.get(name, 0)
        skip = 0 if last is None else max(0, nbytes - last)
        try:
            # Not a file object: 10,000 steps are listed in a second.
            descriptor = os.open(f"{self.path}/{name}", os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError:
            return b""
        try:
            if skip:
                os.lseek(descriptor, skip, os.SEEK_SET)
            return os.read(descriptor, nbytes - skip)
        except OSError:
            return b""
        finally:
            os.close(descriptor)


def list_step(path: str) -> Listing:
    """Everything below a step directory.

    Raises:
        OSError: The directory cannot be read.
    """
    found = Listing(path)
    _list_into(found, path, "", 0)
    return found


def _list_into(found: Listing, path: str, prefix: str, depth: int) -> None:
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    if not prefix:
                        found.directories.append(entry.name)
                    if depth < _DEEPEST:
                        _list_into(found, entry.path, f"{prefix}{entry.name}/", depth + 1)
                    continue
                stat = entry.stat()
            except OSError:
                continue  # a link to nowhere, or a file that is being replaced: as good as absent
            found.files[prefix + entry.name] = stat.st_size
            found.modified = max(found.modified, stat.st_mtime)


def is_whole_json(listing: Listing, name: str) -> bool:
    """Whether a JSON file ends as an object does; one that was cut short does not."""
    return listing.read(name, last=16).rstrip().endswith(b"}")


def dcp_problems(listing: Listing, prefix: str = "") -> tuple[list[str], bytes]:
    """Why the DCP directory ``prefix`` of a step is not whole, and the bytes of its ``.metadata``.

    The files that ``.metadata`` names are found by their names' shape, without unpickling it.

    Source: torch 2.13 ``distributed/checkpoint/filesystem.py``: files are ``__{rank}_{n}.distcp``.
    """
    name = prefix + METADATA
    if name not in listing.files:
        return [f"no {name}: the save was interrupted"], b""
    data = listing.read(name)
    named = sorted({match.decode() for match in _DISTCP.findall(data)})
    if not named:
        return [f"{name} names no .distcp file"], data
    absent = [file for file in named if prefix + file not in listing.files]
    return [f"{prefix}{file} is missing" for file in absent], data


def ranks_that_saved(listing: Listing) -> int:
    """How many ranks wrote the DCP directories of a step, at least; 0 without any."""
    ranks = [
        int(match.group(1))
        for name in listing.files
        if (match := _RANK.fullmatch(name.rpartition("/")[2]))
    ]
    return max(ranks, default=-1) + 1


def missing_ranks(
    listing: Listing, pattern: re.Pattern[str], *, at_least: int
) -> tuple[int, list[int]]:
    """How many files with a rank in their name there are, and which ranks lack theirs.

    Args:
        listing: The step.
        pattern: Matches a file's name; its first group is the rank.
        at_least: Ranks that there must have been.
    """
    ranks = {int(match.group(1)) for name in listing.files if (match := pattern.fullmatch(name))}
    expected = max([at_least, *(rank + 1 for rank in ranks)])
    absent = (rank for rank in range(expected) if rank not in ranks)
    return len(ranks), list(islice(absent, _LISTED))


def typed_path(text: str | os.PathLike[str]) -> Path:
    r"""A path as a user typed or a file stored it, on this machine or on the other system.

    >>> typed_path("out\\checkpoint-500").parts[-1]
    'checkpoint-500'
    """
    path = Path(text).expanduser()
    if "\\" in str(text) and not path.exists():
        return Path(str(text).replace("\\", "/")).expanduser()
    return path
