"""Between torch's tensors and ours: element types, and the memory of one."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dcpconv.core.dtypes import BY_NAME, DType


def dtype_of(tensor: Tensor) -> DType:
    """Our name for a tensor's dtype."""
    return BY_NAME[str(tensor.dtype).removeprefix("torch.")]


def torch_dtype(dtype: DType) -> torch.dtype:
    """The dtype as torch has it."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable; the tensor must outlive them."""
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
