"""Huge pages for memory that is about to be filled.

Filling new memory is what loading from the page cache waits for: a page of 4 KiB is faulted in and
cleared before anything is read into it.  ``python -m bench.pages`` compares both, in turns, on
memory that the process has used before.  Over 15 pairs of 512 MiB on a busy machine of 2 cores,
huge pages took 0.48 x the CPU seconds and 0.55 x the median time; over 7 pairs of 400 MiB at a time
when memory was in pieces, 1.66 x and 2.20 x, since the kernel moves pages to make huge ones (the
best run was still the faster one, 0.52 x).  Nobody can tell beforehand, so it is an option.

Small pages that are asked for at once cost less than as many faults: ``populate`` took a fifth of
the CPU seconds off a ``preadv`` of 512 MiB into new memory, and 5 to 10 % off loading a model.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from dcpconv.loading.memory import inner

SIZE = 2 << 20
"""Bytes of a huge page on x86-64 and on arm64 with pages of 4 KiB."""

_WORTH = 64 << 10
"""Bytes whose faults cost more than asking for their pages."""

_POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE``, which Python does not name."""


def use_huge_pages(tensor: Tensor) -> bool:
    """Ask the system for huge pages wherever a CPU tensor's storage has room for whole ones.

    It is a hint: contents stay, and what has pages already keeps them.  Memory never grows by it,
    since no page reaches beyond the storage.

    Args:
        tensor: New; a DTensor's own shard is meant.

    Returns:
        Whether the system was asked and took it.
    """
    local = inner(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    advise = _advise()
    if local.device.type != "cpu" or advise is None:
        return False
    storage = local.untyped_storage()
    begin = -(-storage.data_ptr() // SIZE) * SIZE
    end = (storage.data_ptr() + storage.nbytes()) // SIZE * SIZE
    return end > begin and advise(begin, end - begin, mmap.MADV_HUGEPAGE) == 0


def populate(tensor: Tensor) -> bool:
    """Get the pages of new memory that is about to be filled, in one call.

    Memory that has most of its pages is left alone: looking at each of them again takes as long as
    reading into it.

    Args:
        tensor: Any; a contiguous one on the CPU is meant.

    Returns:
        Whether the system was asked and had them.

    Source:
        linux ``include/uapi/asm-generic/mman-common.h``; Linux has it since 5.14 and refuses it
        before.
    """
    if tensor.nbytes < _WORTH or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    libc = _libc()
    if libc is None:
        return False
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    nbytes = tensor.data_ptr() + tensor.nbytes - begin
    there = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    if libc.mincore(begin, nbytes, there) or 2 * there.raw.count(0) < len(there):
        return False
    done: int = libc.madvise(begin, nbytes, _POPULATE_WRITE)
    return done == 0


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """``madvise``, where there is one that knows huge pages: on Linux."""
    libc = _libc()
    if libc is None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    call: Callable[[int, int, int], int] = libc.madvise
    return call


@functools.cache
def _libc() -> Any:
    """The C library on Linux, else ``None``: what others do with the same numbers is unknown."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return libc
