"""Huge pages for memory that is about to be filled.

Filling new memory is what loading from the page cache waits for: a page of 4 KiB is faulted in and
cleared before anything is read into it.  ``python -m bench.pages`` compares both, in turns, on
memory that the process has used before.  Over 15 pairs of 512 MiB on a busy machine of 2 cores,
huge pages took 0.48 x the CPU seconds and 0.55 x the median time; over 7 pairs of 400 MiB at a time
when memory was in pieces, 1.66 x and 2.20 x, since the kernel moves pages to make huge ones (the
best run was still the faster one, 0.52 x).  Nobody can tell beforehand, so it is an option.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from dcpconv.loading.memory import inner

SIZE = 2 << 20
"""Bytes of a huge page on x86-64 and on arm64 with pages of 4 KiB."""


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


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """``madvise``, where there is one that knows huge pages: on Linux."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found: Any = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.restype = ctypes.c_int
    call: Callable[[int, int, int], int] = found
    return call
