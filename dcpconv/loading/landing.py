"""Where bytes of a region end up on this rank: in memory of any dtype, strides and device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcpconv.core.dtypes import DType
from dcpconv.engine.cast import cast
from dcpconv.engine.tensors import dtype_of, memory, torch_dtype
from dcpconv.loading.regions import Need


class Destination:
    """The live memory of one region.

    Args:
        need: The region; its model must have memory.
        by_rows: Whether whole rows arrive.
    """

    def __init__(self, need: Need, *, by_rows: bool) -> None:
        self.key = need.place.fqn
        self._into = need.into
        self._row = math.prod(self._into.shape[1:])
        self._flat: Tensor | None = None
        if self._into.is_contiguous():
            self._flat = self._into.view(-1)
        elif not by_rows:
            self._flat = self._into.contiguous().view(-1)

    def takes_bytes(self, dtype: DType, device: torch.device) -> bool:
        """Whether elements of a dtype can be sent and received in the memory itself."""
        into = self._into
        return into.is_contiguous() and into.device.type == device.type and dtype_of(into) is dtype

    def bytes(self, start: int, stop: int) -> Tensor:
        """The bytes of an interval of elements, where ``takes_bytes``."""
        assert self._flat is not None  # noqa: S101 - takes_bytes has said so
        return self._flat[start:stop].view(torch.uint8)

    def put(self, data: Tensor, dtype: DType, at: int) -> tuple[int, int]:
        """Store elements from element ``at`` on; returns ``(overflowed, underflowed)``.

        Args:
            data: Their bytes.
            dtype: What they are.
            at: Index of the first in the region, in C order.
        """
        into = self._part(at, data.numel() // dtype.itemsize)
        if dtype_of(into) is dtype:
            into.copy_(data.view(torch_dtype(dtype)).view(into.shape))
            return 0, 0
        is_plain = into.device.type == "cpu" and into.is_contiguous()
        result = into if is_plain else torch.empty(into.shape, dtype=into.dtype)
        lost = cast(
            memory(data.cpu()), memory(result), source_dtype=dtype, target_dtype=dtype_of(into)
        )
        if result is not into:
            into.copy_(result)
        return lost

    def _part(self, at: int, numel: int) -> Tensor:
        """Memory of an interval: rows as they lie, or part of a copy that ``close`` brings back."""
        if self._flat is None:
            return self._into[at // self._row : (at + numel) // self._row]
        return self._flat[at : at + numel]

    def close(self) -> None:
        """Bring strided memory up to date."""
        if self._flat is not None and not self._into.is_contiguous():
            self._into.copy_(self._flat.view(self._into.shape))
