"""Files of this machine, opened for reading, and the system calls that move bytes between them."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dcpconv.core.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Self


_FICLONERANGE = 0x4020940D  # Source: linux/fs.h, _IOW(0x94, 13, struct file_clone_range)


def _clone(source: int, target: int, source_offset: int, target_offset: int, nbytes: int) -> None:
    request = struct.pack("qQQQ", source, source_offset, nbytes, target_offset)
    fcntl.ioctl(target, _FICLONERANGE, request)


def _copy(source: int, target: int, source_offset: int, target_offset: int, nbytes: int) -> int:
    return os.copy_file_range(source, target, nbytes, source_offset, target_offset)


@dataclass(frozen=True, slots=True)
class System:
    """The system calls a copy is made of; a test replaces one to see the next rung taken.

    Attributes:
        clone: ``(source fd, target fd, source offset, target offset, nbytes)``: share the blocks.
        copy: The same arguments: copy in the kernel; returns bytes copied.
        preadv: As ``os.preadv``.
        pwrite: As ``os.pwrite``.
    """

    clone: Callable[[int, int, int, int, int], None] = _clone
    copy: Callable[[int, int, int, int, int], int] = _copy
    preadv: Callable[[int, Sequence[memoryview], int], int] = os.preadv
    pwrite: Callable[[int, memoryview | bytes, int], int] = os.pwrite


SYSTEM = System()


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
    """

    path: Path
    fd: int
    device: int
    is_sparse: bool
    system: System
    leases: int = 0

    def read(self, offset: int, views: list[memoryview], nbytes: int) -> None:
        """Fill all views, ``nbytes`` together, from the bytes at ``offset``.

        Raises:
            FormatError: The file ends before, or the disk cannot read it.
        """
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


class Sources:
    """Source files below ``path``, opened when first used and kept open while there is room.

    Args:
        path: Directory that every ``Part.file`` is relative to.
        limit: Files to keep open; more only while that many are in use at once.
        system: System calls to use.
    """

    def __init__(self, path: Path, *, limit: int = 128, system: System = SYSTEM) -> None:
        self._path = path
        self._limit = limit
        self._system = system
        self._lock = threading.Lock()
        self._files: OrderedDict[str, SourceFile] = OrderedDict()

    @contextmanager
    def open(self, file: str) -> Iterator[SourceFile]:
        """Lend an open file; it stays open at least until the block ends.

        Raises:
            FormatError: It cannot be opened.
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
        path = self._path / file
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FormatError(
                "source file cannot be opened",
                [("file", path), ("reason", error.strerror)],
                hint="it was there when the checkpoint was listed; was it moved?",
            ) from error
        stat = os.fstat(fd)
        is_sparse = stat.st_blocks * 512 < stat.st_size
        source = SourceFile(path, fd, stat.st_dev, is_sparse, self._system)
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
                os.close(self._files.popitem()[1].fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
