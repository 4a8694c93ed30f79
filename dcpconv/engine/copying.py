"""Open source files, and the ladder of ways to copy a run of bytes out of one.

The first rung that both file systems allow wins: a reflink shares the blocks, ``copy_file_range``
copies inside the kernel or the file server, and a read and a write work everywhere.  Every rung
leaves the same bytes behind.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.core.errors import DcpconvError, NoSpaceError
from dcpconv.stores.local import SourceFile
from dcpconv.stores.system import SYSTEM, System

if TYPE_CHECKING:
    from dcpconv.core.outline import OutFile
    from dcpconv.engine.desks import Tally
    from dcpconv.engine.passing import FileDigests, PassingDigests
    from dcpconv.engine.units import Unit

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

_FOLIO = 64 << 10
"""Bytes that the kernel copies at a time, and keeps in one piece where they start at a multiple of
that in the target: a tenth less work for it."""

_WORTH_RESERVING = 1 << 20
"""Bytes of a run from which reserving blocks is worth a system call."""

_CACHED = 1 << 20
"""Bytes per read and write: they stay in a core's cache between the two."""


_WORTH_STARTING = 256 << 10
"""Bytes from which a unit is worth a system call to start writing it to disk."""


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
        digests: FileDigests | None = None,
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
            digests: Takes all bytes: shared ones are read for them, and the kernel copies none.

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
                if digests is not None:
                    digests.take_from(source, source_offset, target_offset, nbytes, buffer)
                return
        moved = 0
        shift = target_offset - source_offset
        end = source_offset
        for begin, length in source.data(source_offset, nbytes):
            done = 0
            if digests is None:
                done = self._kernel_copy(source, fd, begin, begin + shift, length, device)
            else:
                digests.take_zeros(end + shift, begin - end)
                self._reserve(fd, begin + shift, length, device)
            tally.copied += done
            if done < length:
                at = begin + done
                self._buffered_copy(source, fd, at, at + shift, length - done, buffer, digests)
                tally.buffered += length - done
            moved += length
            end = begin + length
        if digests is not None:
            digests.take_zeros(end + shift, source_offset + nbytes - end)
        tally.holes += nbytes - moved

    def _may(self, rung: str, source: int, target: int) -> bool:
        return (rung, source, target) not in self.refused

    def _refuse(self, rung: str, source: int, target: int, error: OSError) -> None:
        """Remember a refusal; anything else but a full disk is left for the last rung to tell."""
        if error.errno in _FULL:
            raise error
        if error.errno in _REFUSALS:
            self.refused.add((rung, source, target))

    def _reserve(self, fd: int, target: int, nbytes: int, device: int) -> None:
        """Find disk blocks once for a whole run and not for every page: a seventh less work."""
        if nbytes < _WORTH_RESERVING or not self._may("reserve", device, device):
            return
        if not reserve(fd, target, nbytes, system=self.system):
            self.refused.add(("reserve", device, device))

    def _kernel_copy(
        self, source: SourceFile, fd: int, offset: int, target: int, nbytes: int, device: int
    ) -> int:
        """Bytes copied; fewer than ``nbytes`` where the last rung has to go on."""
        done = 0
        if source.device == device:
            self._reserve(fd, target, nbytes, device)
        while done < nbytes and self._may("copy", source.device, device):
            length = min(_STRIDE - (target + done) % _FOLIO, nbytes - done)
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
        self,
        source: SourceFile,
        fd: int,
        offset: int,
        target: int,
        nbytes: int,
        buffer: memoryview,
        digests: FileDigests | None,
    ) -> None:
        step, done = min(len(buffer), _CACHED), 0
        while done < nbytes:
            length = step - (target + done) % _FOLIO if step > _FOLIO else step
            view = buffer[: min(length, nbytes - done)]
            source.read(offset + done, [view], len(view))
            write(fd, view, target + done, system=self.system)
            if digests is not None:
                digests.take(target + done, view)
            done += len(view)


def write(fd: int, data: memoryview | bytes, offset: int, *, system: System = SYSTEM) -> None:
    """Write all of ``data`` at ``offset``."""
    view = memoryview(data)
    while view:
        count = system.pwrite(fd, view, offset)
        offset += count
        view = view[count:]


def reserve(fd: int, offset: int, nbytes: int, *, system: System = SYSTEM) -> bool:
    """Find disk blocks for bytes that will be written; returns whether the file system does that.

    Raises:
        OSError: The disk is full.
    """
    try:
        system.reserve(fd, offset, nbytes)
    except OSError as error:
        if error.errno in _FULL:
            raise
        return False
    return True


def write_back(fd: int, offset: int, nbytes: int, *, system: System = SYSTEM) -> None:
    """Have the disk start on it now instead of at the final sync: 1.5 to 3 times as fast for
    results that memory could hold."""
    if nbytes >= _WORTH_STARTING:
        with suppress(OSError):
            system.start_writing(fd, offset, nbytes)


@dataclass(frozen=True, slots=True)
class OutDirectory:
    """The directory of a result.

    Attributes:
        path: An existing directory.
        fd: The same, open, where its files are there already, as long as they will be: whatever
            takes the name of the directory later is not written to.
        digests: Take what passes.
    """

    path: Path
    fd: int | None = None
    digests: PassingDigests | None = None

    def make(self, name: str, nbytes: int) -> int:
        """Create a file that must not exist."""
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(fd, nbytes)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            raise write_error(error, path) from error
        return fd

    def open(self, name: str) -> int:
        """Open a file that another process has made."""
        try:
            return os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError as error:
            raise write_error(error, self.path / name) from error


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


class Output:
    """A file being written; ``pending`` counts its units under way, and the listing of them."""

    __slots__ = ("digests", "fd", "name", "path", "pending")

    def __init__(self, target: OutDirectory, file: OutFile) -> None:
        self.name = file.name
        self.digests = target.digests.file(file.name) if target.digests is not None else None
        self.path = target.path / file.name
        self.pending = 1
        if target.fd is None:
            self.fd = target.make(file.name, file.nbytes)
        else:
            self.fd = target.open(file.name)

    def announce(self, unit: Unit) -> None:
        """A file is written in any order."""

    def skip(self, unit: Unit) -> None:
        """What is not written is zeros."""
        if self.digests is not None:
            self.digests.take_zeros(unit.offset, unit.nbytes)

    def write(self, data: memoryview | bytes, offset: int, *, system: System) -> None:
        write(self.fd, data, offset, system=system)
        if self.digests is not None:
            self.digests.take(offset, data)

    def write_back(self, unit: Unit, system: System) -> None:
        write_back(self.fd, unit.offset, unit.nbytes, system=system)

    def finish(self) -> None:
        try:
            os.fsync(self.fd)
        finally:
            os.close(self.fd)


def shares_blocks(source: Path, directory: Path, *, system: System = SYSTEM) -> bool:
    """Whether a copy of ``source`` into ``directory`` can be a reflink that takes no space.

    Found out by cloning one block into a file that is removed again; ``False`` on any doubt.
    """
    import tempfile  # noqa: PLC0415 - only a probe needs it

    block = os.statvfs(directory).f_bsize
    try:
        with source.open("rb") as file, tempfile.TemporaryFile(dir=directory) as probe:
            if os.fstat(file.fileno()).st_size < block:
                return False
            system.clone(file.fileno(), probe.fileno(), 0, 0, block)
    except OSError:
        return False
    return True
