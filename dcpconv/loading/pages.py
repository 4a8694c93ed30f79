"""Huge pages for memory that is about to be filled."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

from torch import Tensor

SIZE = 2 << 20
"""Bytes of a huge page on x86-64 and on arm64 with pages of 4 KiB."""


def use_huge_pages(tensor: Tensor) -> bool:
    """Ask the system for huge pages wherever a CPU tensor's storage has room for whole ones.

    It is a hint: contents stay, and what has pages already keeps them.

    Returns:
        Whether the system was asked and took it.
    """
    storage = tensor.untyped_storage()
    advise = _advise()
    if tensor.device.type != "cpu" or advise is None:
        return False
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
