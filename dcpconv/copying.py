"""Open source files, and the ladder of ways to copy a run of bytes out of one.

The first rung that both file systems allow wins: a reflink shares the blocks, ``copy_file_range``
copies inside the kernel or the file server, and a read and a write work everywhere.  Every rung
leaves the same bytes behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dcpconv.errors import DcpconvError, FormatError, NoSpaceError

if TYPE_CHECKING:
    from typing_extensions import Self

_FICLONERANGE = 0x4020940D  # Source: linux/fs.h, _IOW(0x94, 13, struct file_clone_range)
_REFUSALS = {
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EPERM,
    errno.EBADF,
    errno.ETXTBSY,
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STRIDE = 16 << 20
"""Bytes per system call: long enough to cost nothing, short enough to stop soon after Ctrl-C."""

_CACHED = 1 << 20
"""Bytes per read and write: they stay in a core's cache between the two."""


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
class Tally:
    """Bytes moved so far, by how; one per thread, so that counting needs no lock."""

    reflinked: int = 0
    copied: int = 0
    buffered: int = 0
    relabelled: int = 0
    cast: int = 0
    holes: int = 0

    def add(self, other: Tally) -> None:
        """Add another thread's counts."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


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


@dataclass(slots=True)
class Ladder:
    """Copies runs by the first rung that works, and remembers which ones do not.

    Attributes:
        block: Alignment that a reflink needs, in bytes.
        system: System calls to use.
        refused: ``(rung, source device, target device)`` that a file system declined.
    """

    block: int
    system: System = SYSTEM
    refused: set[tuple[str, int, int]] = field(default_factory=set)

    def copy(
        self,
        source: SourceFile,
        fd: int,
        *,
        source_offset: int,
        target_offset: int,
        nbytes: int,
        buffer: memoryview,
        tally: Tally,
    ) -> None:
        """Copy one run into a file that is zeros there.

        Args:
            source: Where from.
            fd: Target file, open for writing and already as long as it will be.
            source_offset: First byte in the source.
            target_offset: First byte in the target.
            nbytes: Length of the run.
            buffer: Room for the last rung.
            tally: Gets the bytes added.

        Raises:
            FormatError: The source is too short or unreadable.
            OSError: The target cannot be written.
        """
        device = os.fstat(fd).st_dev
        aligned = not (source_offset % self.block or target_offset % self.block)
        if aligned and nbytes % self.block == 0 and self._may("clone", source.device, device):
            try:
                self.system.clone(source.fd, fd, source_offset, target_offset, nbytes)
            except OSError as error:
                self._refuse("clone", source.device, device, error)
            else:
                tally.reflinked += nbytes
                return
        moved = 0
        shift = target_offset - source_offset
        for begin, length in source.data(source_offset, nbytes):
            done = self._kernel_copy(source, fd, begin, begin + shift, length, device)
            tally.copied += done
            if done < length:
                at = begin + done
                _buffered_copy(source, fd, at, at + shift, length - done, buffer, self.system)
                tally.buffered += length - done
            moved += length
        tally.holes += nbytes - moved

    def _may(self, rung: str, source: int, target: int) -> bool:
        return (rung, source, target) not in self.refused

    def _refuse(self, rung: str, source: int, target: int, error: OSError) -> None:
        """Remember a refusal; anything else but a full disk is left for the last rung to tell."""
        if error.errno in _FULL:
            raise error
        if error.errno in _REFUSALS:
            self.refused.add((rung, source, target))

    def _kernel_copy(
        self, source: SourceFile, fd: int, offset: int, target: int, nbytes: int, device: int
    ) -> int:
        """Bytes copied; fewer than ``nbytes`` where the last rung has to go on."""
        done = 0
        while done < nbytes and self._may("copy", source.device, device):
            length = min(_STRIDE, nbytes - done)
            try:
                count = self.system.copy(source.fd, fd, offset + done, target + done, length)
            except AttributeError:  # this system has no such call
                self.refused.add(("copy", source.device, device))
                break
            except OSError as error:
                self._refuse("copy", source.device, device, error)
                break
            if count == 0:
                break
            done += count
        return done


def _buffered_copy(
    source: SourceFile,
    fd: int,
    offset: int,
    target: int,
    nbytes: int,
    buffer: memoryview,
    system: System,
) -> None:
    step = min(len(buffer), _CACHED)
    for start in range(0, nbytes, step):
        view = buffer[: min(step, nbytes - start)]
        source.read(offset + start, [view], len(view))
        write(fd, view, target + start, system=system)


def write(fd: int, data: memoryview | bytes, offset: int, *, system: System = SYSTEM) -> None:
    """Write all of ``data`` at ``offset``."""
    view = memoryview(data)
    while view:
        count = system.pwrite(fd, view, offset)
        offset += count
        view = view[count:]


def write_error(error: OSError, path: Path) -> DcpconvError:
    """What a failed write means for the user."""
    facts = [("file", path), ("reason", error.strerror or error)]
    if error.errno == errno.EFBIG:
        hint = "this disk limits how long a file can be; write smaller files or to another disk"
        return NoSpaceError("a file of the result is too long for its disk", facts, hint=hint)
    if error.errno in _FULL:
        hint = "free some space or choose another disk; the source is untouched"
        return NoSpaceError("the disk filled up while the result was written", facts, hint=hint)
    return DcpconvError("the result cannot be written", facts, hint="the source is untouched")


def shares_blocks(source: Path, directory: Path, *, system: System = SYSTEM) -> bool:
    """Whether a copy of ``source`` into ``directory`` can be a reflink that takes no space.

    Found out by cloning one block into a file that is removed again; ``False`` on any doubt.
    """
    block = os.statvfs(directory).f_bsize
    try:
        with source.open("rb") as file, tempfile.TemporaryFile(dir=directory) as probe:
            if os.fstat(file.fileno()).st_size < block:
                return False
            system.clone(file.fileno(), probe.fileno(), 0, 0, block)
    except OSError:
        return False
    return True
