"""What lies in one step directory: names, bytes and times, with one look per directory."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.zip_records import ReadAt
from dcpconv.runs.entries import Entry, Place, place_of, scanned
from dcpconv.stores.local import read_regular
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.schemes import path_of, scheme_of

METADATA: Final = ".metadata"

LARGEST_TEXT: Final = 1 << 28
"""Bytes of a JSON file, a log or a ``.metadata`` that is read whole; a log of millions of lines."""

_DEEPEST: Final = 4
"""Directories below a step: none of the layouts nests deeper."""

_MOST: Final = 100_000
"""Files of one step that are looked at; 4,096 ranks with three files each are far below."""

_LISTED: Final = 8
"""Missing ranks that are named; who lost more has lost the step anyway."""

_DISTCP = re.compile(rb"__[0-9]+_[0-9]+\.distcp")
_RANK = re.compile(r"__([0-9]{1,9})_[0-9]+\.distcp")

# Not blocking: what was a file a moment ago may be a pipe now.
_READ: Final = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(slots=True)
class Listing:
    """Files below one directory.

    Attributes:
        path: The directory.
        files: Bytes of every regular file by its relative name, with ``/`` between the parts.
        directories: Names directly inside ``path``.
        odd: What is neither a regular file nor a directory: pipes, devices, sockets.
        is_cut: Whether there are more files than are looked at.
        modified: When the youngest file changed, in seconds since 1970.
    """

    path: Place
    files: dict[str, int] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    is_cut: bool = False
    modified: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def read(self, name: str, *, last: int | None = None) -> bytes:
        """The bytes of one file, or only its ``last``; empty where it cannot be read.

        A file of more than ``LARGEST_TEXT`` bytes is none of those that are read whole.
        """
        nbytes = self.files.get(name, 0)
        wanted = nbytes if last is None else min(nbytes, last)
        if wanted > LARGEST_TEXT:
            return b""
        try:
            with self.opened(name) as read:
                return read(nbytes - wanted, wanted)
        except OSError:
            return b""

    @contextmanager
    def opened(self, name: str) -> Iterator[ReadAt]:
        """Bytes of one file by offset.

        Raises:
            OSError: It cannot be opened.
        """
        if isinstance(self.path, RemotePath):
            yield (self.path / name).ranged.read
            return
        descriptor = os.open(f"{self.path}/{name}", _READ)
        try:
            yield lambda offset, nbytes: os.pread(descriptor, nbytes, offset)
        finally:
            os.close(descriptor)


def list_step(path: Place) -> Listing:
    """Everything below a step directory.

    Raises:
        OSError: The directory cannot be read.
    """
    found = Listing(path)
    _list_into(found, path, "", [])
    return found


def _list_into(found: Listing, path: Place, prefix: str, linked: list[tuple[int, int]]) -> None:
    with scanned(path) as entries:
        for entry in entries:
            if len(found.files) >= _MOST:
                found.is_cut = True
                return
            try:
                if entry.is_dir():
                    if not prefix:
                        found.directories.append(entry.name)
                    if prefix.count("/") < _DEEPEST and not _is_seen(found, entry, linked):
                        _list_into(found, place_of(entry), f"{prefix}{entry.name}/", linked)
                    continue
                status = entry.stat()
            except OSError:
                continue  # a link to nowhere, or a file that is being replaced: as good as absent
            if not stat.S_ISREG(status.st_mode):
                found.odd.append(prefix + entry.name)
                continue
            found.files[prefix + entry.name] = status.st_size
            found.modified = max(found.modified, status.st_mtime)


def _is_seen(found: Listing, entry: Entry, linked: list[tuple[int, int]]) -> bool:
    """Whether a link leads to a directory that was listed: links may lead in circles."""
    if not entry.is_symlink():
        return False
    if not linked:
        root = Path(found.path).stat()
        linked.append((root.st_dev, root.st_ino))
    status = entry.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in linked:
        return True
    linked.append(identity)
    return False


def text_of(path: Path) -> bytes:
    """A whole file; empty where it is no regular file, larger than a text or not to be read."""
    if isinstance(path, RemotePath):
        try:
            return path.read_at_most(LARGEST_TEXT)
        except (OSError, ValueError):
            return b""
    try:
        return read_regular(path, most=LARGEST_TEXT)
    except (OSError, ValueError, FormatError):
        return b""


def is_whole_json(listing: Listing, name: str) -> bool:
    """Whether a JSON file ends as an object does; one that was cut short does not."""
    return listing.read(name, last=16).rstrip().endswith(b"}")


def dcp_problems(listing: Listing, prefix: str = "") -> tuple[list[str], bytes]:
    """Why the DCP directory ``prefix`` of a step is not whole, and the bytes of its ``.metadata``.

    The files that ``.metadata`` names are found by their names' shape, without unpickling it.

    Source: torch 2.13 ``distributed/checkpoint/filesystem.py``: files are ``__{rank}_{n}.distcp``,
    ``.metadata`` is one pickle.
    """
    name = prefix + METADATA
    if name not in listing.files:
        return [f"no {name}: the save was interrupted"], b""
    if listing.files[name] > LARGEST_TEXT:
        return [f"{name} is larger than {LARGEST_TEXT:,} bytes"], b""
    data = listing.read(name)
    named = sorted({match.decode() for match in _DISTCP.findall(data)})
    if not named:
        return [f"{name} names no .distcp file"], data
    if not (data.startswith(b"\x80") and data.endswith(b".")):
        return [f"{name} was cut short: it is no whole pickle"], data
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
    return len(ranks), absent_ranks(ranks, at_least=at_least)


def absent_ranks(ranks: set[int], *, at_least: int) -> list[int]:
    """The first ranks that are not among ``ranks``, which count from 0 without a gap."""
    expected = max([at_least, *(rank + 1 for rank in ranks)])
    return list(islice((rank for rank in range(expected) if rank not in ranks), _LISTED))


def typed_path(text: str | os.PathLike[str]) -> Path:
    r"""A path as a user typed or a file stored it, on this machine, on the other system, or a URL.

    >>> typed_path("out\\checkpoint-500").parts[-1]
    'checkpoint-500'
    """
    if scheme_of(text) is not None or isinstance(text, RemotePath):
        return path_of(text)
    path = Path(text).expanduser()
    if "\\" in str(text) and not path.exists():
        return Path(str(text).replace("\\", "/")).expanduser()
    return path
