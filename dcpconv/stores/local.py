"""Files of this machine, opened for reading."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.core.catalog import Catalog, Identity
from dcpconv.core.errors import FormatError, SourceChangedError
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.schemes import path_of, scheme_of
from dcpconv.stores.system import SYSTEM, System

if TYPE_CHECKING:
    from typing_extensions import Self

    from dcpconv.stores.ranged import Heading, Ranged


def open_regular(path: Path) -> int:
    """A descriptor of a regular file for reading; whatever else is there is not even waited for.

    Raises:
        OSError: It cannot be opened.
        FormatError: It is a pipe, a device, a directory: reading those may hang, or never end.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise FormatError(
        "this is no regular file",
        [("file", path), ("expected", "a file, not a directory, pipe or device")],
    )


class OpenFile:
    """A file being read by offset and length, wherever it is.

    Args:
        path: A regular file, or an object of a store.

    Attributes:
        nbytes: Its length.
        identity: What it is.
        expect: Has bytes checked when what follows is read; ``None`` where a look costs nothing.

    Raises:
        OSError: It cannot be opened.
        FormatError: It is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        if isinstance(path, RemotePath):
            self._ranged = path.ranged
            self.identity = path.identity()
            self.expect: Callable[[Heading], None] | None = self._ranged.expect
        else:
            self._fd = open_regular(path)
            self.identity = identity_of(self._fd)
            self.expect = None
        self.nbytes = self.identity[2]

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of it, fewer only at its end."""
        if self._fd < 0:
            return self._ranged.read(offset, nbytes)
        return os.pread(self._fd, nbytes, offset)

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()


def read_regular(path: Path, *, most: int) -> bytes:
    """All of a regular file that is not larger than it may be.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        OSError: It cannot be opened.
        FormatError: It is no regular file, or larger.
    """
    if isinstance(path, RemotePath):
        return path.read_at_most(most)
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        facts = [("file", path), ("expected", f"at most {most:,} bytes")]
        raise FormatError("the file is far larger than any of its kind", facts)
    return data


def identity_of(file: Path | int) -> Identity:
    """What a file is now; in a store, what it was when it was listed.

    Raises:
        OSError: It is gone.
    """
    if isinstance(file, RemotePath):
        return file.identity()
    state = os.stat(file)  # noqa: PTH116 - also of a descriptor
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def identities_of(directory: Path, names: Iterable[str]) -> dict[str, Identity]:
    """What files are before anything in them is read; whoever reads tells what is amiss."""
    found = {}
    for name in names:
        with suppress(OSError):
            found[name] = identity_of(directory / name)
    return found


def require_unchanged(directory: Path, identities: Mapping[str, Identity]) -> None:
    """Every file is what it was when its headers were read.

    Raises:
        SourceChangedError: Some are not; all are listed.
    """
    if isinstance(directory, RemotePath):
        directory.require_unchanged(identities)
        return
    changed = []
    for file, known in identities.items():
        path = directory / file
        try:
            found = identity_of(path)
        except OSError:
            changed.append((path, "it is gone"))
            continue
        if found != known:
            changed.append((path, _difference(known, found)))
    if changed:
        raise _changed(changed)


def _difference(known: Identity, found: Identity) -> str:
    if known[:2] != found[:2]:
        return "another file has its name"
    if known[2] != found[2]:
        return f"{known[2]:,} bytes before, {found[2]:,} now"
    return "it was written to"


def _changed(changed: Iterable[tuple[Path, str]]) -> SourceChangedError:
    return SourceChangedError(
        "the source changed while it was being read",
        [("changed", f"{path}: {how}") for path, how in changed],
        hint="run this again once nothing writes to it",
    )


@dataclass(slots=True)
class SourceFile:
    """A source file opened for reading.

    Attributes:
        path: For messages.
        fd: Open file.
        device: ``st_dev``, which decides what rungs can work.
        is_sparse: Whether it has holes worth skipping.
        system: System calls to use.
        leases: Threads that are using it now.
        ranged: The object that it is, where it is in a store; no system call copies from that.
    """

    path: Path
    fd: int
    device: int
    is_sparse: bool
    system: System
    leases: int = 0
    ranged: Ranged | None = None

    def read(self, offset: int, views: list[memoryview], nbytes: int) -> None:
        """Fill all views, ``nbytes`` together, from the bytes at ``offset``.

        Raises:
            FormatError: The file ends before, or the disk cannot read it.
        """
        if self.ranged is not None:
            self.ranged.fill(offset, views, nbytes)
            return
        while nbytes:
            try:
                count = self.system.preadv(self.fd, views, offset)
            except OSError as error:
                raise FormatError(
                    "source file cannot be read",
                    [("file", self.path), ("at byte", offset), ("reason", error.strerror)],
                    hint="check the disk; then fetch or copy this file again",
                ) from error
            if count == nbytes:
                return
            if count == 0:
                found = os.fstat(self.fd).st_size
                raise FormatError(
                    "source file ends while it is being read",
                    [("file", self.path), ("expected", f"{offset + nbytes} bytes, found {found}")],
                    hint="something shortened it meanwhile; fetch or copy this file again",
                )
            offset += count
            nbytes -= count
            while count >= len(views[0]):
                count -= len(views.pop(0))
            views[0] = views[0][count:]

    def data(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """``(offset, nbytes)`` of everything in the run that is not a hole."""
        if not self.is_sparse:
            yield offset, nbytes
            return
        end = offset + nbytes
        while offset < end:
            try:
                begin = os.lseek(self.fd, offset, os.SEEK_DATA)
                stop = os.lseek(self.fd, begin, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO and end <= os.fstat(self.fd).st_size:
                    return  # nothing but a hole up to the end of the file
                begin, stop = offset, end
            if begin < end:
                yield begin, min(stop, end) - begin
            offset = stop

    def is_hole(self, offset: int, nbytes: int) -> bool:
        """Whether the run holds no data at all; ``False`` where the file system cannot tell."""
        return self.is_sparse and next(self.data(offset, nbytes), None) is None


def path_beside(directory: Path, file: str) -> Path:
    """A file of a checkpoint, or one of an adapter, which is named whole, wherever either is."""
    if scheme_of(file) is not None:
        return path_of(file)
    return Path(file) if file.startswith("/") else directory / file


class Sources:
    """Source files below ``path``, opened when first used and kept open while there is room.

    Args:
        path: Directory that every ``Part.file`` is relative to.
        identities: What files were when their headers were read; others are what they are when
            they are opened first.
        limit: Files to keep open; more only while that many are in use at once.
        system: System calls to use.
    """

    def __init__(
        self,
        path: Path,
        *,
        identities: Mapping[str, Identity] | None = None,
        limit: int = 128,
        system: System = SYSTEM,
    ) -> None:
        self._path = path
        self._identities = dict(identities or {})
        self._limit = limit
        self._system = system
        self._lock = threading.Lock()
        self._files: OrderedDict[str, SourceFile] = OrderedDict()

    @classmethod
    def of(cls, catalog: Catalog) -> Self:
        """The files of a checkpoint, which must be what they were when it was opened."""
        return cls(catalog.path, identities=catalog.identities)

    def require_unchanged(self) -> None:
        """Everything read so far is of one state of the files.

        Raises:
            SourceChangedError: Something wrote to them, or put others in their place.
        """
        with self._lock:
            require_unchanged(self._path, self._identities)

    @property
    def is_remote(self) -> bool:
        """Whether the files are objects of a store."""
        return isinstance(self._path, RemotePath)

    def ranged(self, file: str) -> Ranged | None:
        """The object that a file is; ``None`` for a file of this machine."""
        path = path_beside(self._path, file)
        return path.ranged if isinstance(path, RemotePath) else None

    @contextmanager
    def open(self, file: str) -> Iterator[SourceFile]:
        """Lend an open file; it stays open at least until the block ends.

        Raises:
            FormatError: It cannot be opened.
            SourceChangedError: It is another file than the one whose headers were read.
        """
        with self._lock:
            source = self._files.get(file) or self._add(file)
            self._files.move_to_end(file)
            source.leases += 1
        try:
            yield source
        finally:
            with self._lock:
                source.leases -= 1

    def _add(self, file: str) -> SourceFile:
        path = path_beside(self._path, file)
        if isinstance(path, RemotePath):
            source = SourceFile(path, -1, -1, is_sparse=False, system=self._system)
            source.ranged = path.ranged
            return self._files.setdefault(file, source)
        try:
            fd = open_regular(path)
        except OSError as error:
            raise FormatError(
                "source file cannot be opened",
                [("file", path), ("reason", error.strerror)],
                hint="it was there when the checkpoint was listed; was it moved?",
            ) from error
        found = identity_of(fd)
        known = self._identities.setdefault(file, found)
        if known != found:
            os.close(fd)
            raise _changed([(path, _difference(known, found))])
        state = os.fstat(fd)
        is_sparse = state.st_blocks * 512 < state.st_size
        source = SourceFile(path, fd, state.st_dev, is_sparse, self._system)
        for idle in [name for name, one in self._files.items() if not one.leases]:
            if len(self._files) < self._limit:
                break
            os.close(self._files.pop(idle).fd)
        self._files[file] = source
        return source

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._files:
                fd = self._files.popitem()[1].fd
                if fd >= 0:
                    os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()
