"""Whether a disk can hold a result, and how much of it will take no room: blocks shared with the
source, and holes."""

from __future__ import annotations

import os
from pathlib import Path

from dcpconv.core.errors import NoSpaceError
from dcpconv.core.outline import Outline
from dcpconv.engine.copying import shares_blocks
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.system import SYSTEM, System


def spared(outline: Outline, *, source: Path, stage: Path, system: System = SYSTEM) -> int:
    """Bytes of a result that need no new disk blocks.

    Where the file system clones blocks (tried on one block, beside the result), those are the
    aligned middles of all runs that lie alike in source and target.  Elsewhere they are the holes
    of sparse source files, which stay holes.

    Args:
        outline: The result.
        source: Directory that ``Part.file`` is relative to.
        stage: Existing directory on the disk that the result is written to.
        system: System calls to use.
    """
    names = sorted(
        {part.file for f in outline.files for _, fill in f.payloads for part in fill.parts}
    )
    block = os.statvfs(stage).f_bsize
    if names and shares_blocks(source / names[0], stage, system=system):
        return _alike(outline, block)
    return sum(_holes(source / name) for name in names)


def _alike(outline: Outline, block: int) -> int:
    total = 0
    for file in outline.files:
        for offset, fill in file.payloads:
            if fill.is_computed:
                continue
            itemsize = fill.target_dtype.itemsize
            for part in fill.parts:
                target = offset + part.target * itemsize
                if part.is_contiguous and (target - part.offset) % block == 0:
                    stop = target + part.numel * itemsize
                    total += max(0, stop // block - -(-target // block)) * block
    return total


def _holes(path: Path) -> int:
    state = path.stat()
    return max(0, state.st_size - 512 * getattr(state, "st_blocks", state.st_size))


def block_size(target: Path) -> int:
    """Block size to line payloads up with: 4096 bytes, or the file system's where it is larger."""
    if isinstance(target, RemotePath):
        return 4096
    directory = target.absolute()
    while not directory.exists():
        directory = directory.parent
    if not hasattr(os, "statvfs"):
        return 4096
    block = os.statvfs(directory).f_frsize
    return block if 4096 < block <= 65536 and block & (block - 1) == 0 else 4096


def writes_anywhere(directory: Path, *, system: System = SYSTEM) -> bool:
    """Whether two handles of one file can be written at any place, in any order.

    Object stores mounted as file systems take bytes only from the first to the last.
    """
    probe = directory / ".probe"
    block = 4096
    try:
        fds = [os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for _ in range(2)]
        try:
            os.ftruncate(fds[0], 2 * block)
            for at, fd in ((block, fds[1]), (0, fds[0])):
                system.pwrite(fd, memoryview(bytes([at // block + 1]) * block), at)
            return os.pread(fds[1], 2 * block, 0) == bytes([1]) * block + bytes([2]) * block
        finally:
            for fd in fds:
                os.close(fd)
            probe.unlink()
    except OSError:
        return False


def check_space(target: Path, nbytes: int, *, reflinkable: int = 0) -> None:
    """Refuse a result that the disk cannot hold.

    Args:
        target: Where it will be; need not exist.
        nbytes: Length of all its files.
        reflinkable: How much of that will share blocks with the source.

    Raises:
        NoSpaceError: Less is free than needed.
    """
    target = Path(os.path.realpath(target))
    existing = next(path for path in (target, *target.parents) if path.exists())
    stat = os.statvfs(existing)
    free = stat.f_bavail * stat.f_frsize
    needed = max(0, nbytes - reflinkable)
    if needed > free:
        raise NoSpaceError(
            "the disk cannot hold the result",
            [
                ("target", target),
                ("needed", f"{needed / (1 << 30):.2f} GiB"),
                ("free", f"{free / (1 << 30):.2f} GiB"),
            ],
            hint="free some space or choose another disk",
        )
