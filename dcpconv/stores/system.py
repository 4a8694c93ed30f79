"""The system calls that move bytes between files of this machine."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

_FICLONERANGE = 0x4020940D  # Source: linux/fs.h, _IOW(0x94, 13, struct file_clone_range)


def _clone(source: int, target: int, source_offset: int, target_offset: int, nbytes: int) -> None:
    request = struct.pack("qQQQ", source, source_offset, nbytes, target_offset)
    fcntl.ioctl(target, _FICLONERANGE, request)


def _copy(source: int, target: int, source_offset: int, target_offset: int, nbytes: int) -> int:
    return os.copy_file_range(source, target, nbytes, source_offset, target_offset)


_RESERVE = 0x40305828  # Source: linux/falloc.h, FS_IOC_RESVSP: _IOW('X', 40, struct space_resv)
_START_WRITING = 2  # Source: linux/fs.h, SYNC_FILE_RANGE_WRITE


def _reserve(fd: int, offset: int, nbytes: int) -> None:
    # Unlike posix_fallocate, which writes to every block where a file system cannot reserve.
    fcntl.ioctl(fd, _RESERVE, struct.pack("hhqqiI16x", 0, os.SEEK_SET, offset, nbytes, 0, 0))


def _start_writing(fd: int, offset: int, nbytes: int) -> None:
    if (call := _sync_file_range()) is not None:
        call(fd, offset, nbytes, _START_WRITING)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The C library's function, where there is one."""
    import ctypes  # noqa: PLC0415 - only what writes large files needs it

    try:
        call = ctypes.CDLL(None).sync_file_range
    except AttributeError:  # not Linux
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    function: Callable[[int, int, int, int], int] = call
    return function


@dataclass(frozen=True, slots=True)
class System:
    """The system calls a copy is made of; a test replaces one to see the next rung taken.

    Attributes:
        clone: ``(source fd, target fd, source offset, target offset, nbytes)``: share the blocks.
        copy: The same arguments: copy in the kernel; returns bytes copied.
        reserve: ``(fd, offset, nbytes)``: find disk blocks for bytes that will be written.
        start_writing: ``(fd, offset, nbytes)``: have the disk start on them, and wait for nothing.
        preadv: As ``os.preadv``.
        pwrite: As ``os.pwrite``.
    """

    clone: Callable[[int, int, int, int, int], None] = _clone
    copy: Callable[[int, int, int, int, int], int] = _copy
    reserve: Callable[[int, int, int], None] = _reserve
    start_writing: Callable[[int, int, int], None] = _start_writing
    preadv: Callable[[int, Sequence[memoryview], int], int] = os.preadv
    pwrite: Callable[[int, memoryview | bytes, int], int] = os.pwrite


SYSTEM = System()
