"""Rows of stored matrices as tensors, for what must see whole rows: factors, norms, replacements.

torch is imported when the first row is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpconv.core.catalog import TensorEntry, c_strides
from dcpconv.stores.local import Sources

if TYPE_CHECKING:
    from torch import Tensor


def read_rows(entry: TensorEntry, start: int, stop: int, sources: Sources, dtype: object) -> Tensor:
    """Rows of a stored matrix, all of its columns; stacked matrices follow one another.

    Args:
        entry: A tensor of up to three dims, whatever chunks it is stored in.
        start: First row.
        stop: End of the rows.
        sources: Where its files are open.
        dtype: torch's element type of the result.
    """
    import torch  # noqa: PLC0415

    stored = getattr(torch, entry.dtype.name)
    _, height, columns = as_stack(entry.shape)
    made = torch.empty(stop - start, columns, dtype=stored)
    for chunk in entry.chunks:
        sizes, offsets = as_stack(chunk.sizes), (0,) * (3 - len(chunk.offsets)) + chunk.offsets
        strides = (0,) * (3 - len(chunk.sizes)) + (chunk.strides or c_strides(chunk.sizes))
        for expert in range(sizes[0]):
            above = (offsets[0] + expert) * height + offsets[1]
            low, high = max(start, above), min(stop, above + sizes[1])
            if low >= high or not sizes[2]:
                continue
            first = expert * strides[0] + (low - above) * strides[1]
            reach = 1 + (high - low - 1) * strides[1] + (sizes[2] - 1) * strides[2]
            data = memoryview(bytearray(reach * entry.dtype.itemsize))
            with sources.open(chunk.extent.file) as opened:
                at = chunk.extent.offset + first * entry.dtype.itemsize
                opened.read(at, [data], len(data))
            box = torch.frombuffer(data, dtype=stored)
            box = box.as_strided((high - low, sizes[2]), (strides[1], strides[2]))
            made[low - start : high - start, offsets[2] : offsets[2] + sizes[2]] = box
    return made.to(dtype)  # type: ignore[call-overload,no-any-return]


def as_stack(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape of up to three dims as a stack of matrices; a vector is one row."""
    stack, rows, columns = (1,) * (3 - len(shape)) + shape
    return stack, rows, columns
