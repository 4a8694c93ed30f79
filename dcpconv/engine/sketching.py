"""How the values of a box are distributed: a histogram in two passes of constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpconv.core.dtypes import DType
from dcpconv.core.outline import Fill
from dcpconv.engine.boxes import Box
from dcpconv.engine.cast import tensor
from dcpconv.stores.local import Sources

_CHUNK = 1 << 20
"""Bytes read at a time."""

BINS = 96
"""Bars of a histogram."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is seen of a tensor's values.

    Attributes:
        numel: Elements.
        odd: Elements that are infinite or no number; the rest is about the others.
        zeros: Elements that are zero.
        low: Smallest value.
        high: Largest value.
        mean: Mean.
        std: Standard deviation, of a population.
        counts: Elements per bar, between ``low`` and ``high``; empty where there are none.
    """

    numel: int
    odd: int
    zeros: int
    low: float
    high: float
    mean: float
    std: float
    counts: tuple[int, ...]


def sketch(fill: Fill, *, sources: Sources) -> Sketch:
    """Reads a box twice: for its extremes, then for the bars between them.

    Args:
        fill: What it consists of, stored bytes alone.
        sources: Where the parts' files are open.

    Raises:
        FormatError: A source file is missing, unreadable or too short.
    """
    odd = zeros = 0
    low, high = math.inf, -math.inf
    sums, squares = [], []
    for values in _values(fill, sources):
        finite = values[values.isfinite()]
        odd += len(values) - len(finite)
        zeros += len(finite) - int(finite.count_nonzero())
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            sums.append(float(finite.sum()))
            squares.append(float(finite.dot(finite)))
    numel = fill.numel
    usual = numel - odd
    if not usual:
        return Sketch(numel, odd, 0, math.nan, math.nan, math.nan, math.nan, ())
    mean = math.fsum(sums) / usual
    std = math.sqrt(max(0.0, math.fsum(squares) / usual - mean * mean))
    counts = torch.zeros(BINS, dtype=torch.int64)
    width = high - low
    for values in _values(fill, sources):
        finite = values[values.isfinite()]
        place = (finite - low) * (BINS / width) if width else torch.zeros_like(finite)
        counts += torch.bincount(place.long().clamp(0, BINS - 1), minlength=BINS)
    bars = tuple(int(count) for count in counts)
    return Sketch(numel, odd, zeros, low, high, mean, std, bars)


def _values(fill: Fill, sources: Sources) -> Iterator[Tensor]:
    box = Box(fill)
    step = _CHUNK // box.itemsize
    for start in range(0, fill.numel, step):
        stop = min(start + step, fill.numel)
        view = memoryview(bytearray((stop - start) * box.itemsize))
        box.read(start, stop, sources=sources, into=view)
        yield _as_numbers(view, fill.source_dtype)


def _as_numbers(view: memoryview, dtype: DType) -> Tensor:
    if dtype.packed > 1:
        return torch.frombuffer(view, dtype=torch.uint8).double()
    values = tensor(view, dtype)
    if values.is_complex():
        return values.abs().double()
    return values.float().double() if dtype.itemsize == 1 else values.double()
