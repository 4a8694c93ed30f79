"""How far apart two runs of values are.

numpy does it: importing torch would take longer than comparing a gigabyte, and 200 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcpconv.core.dtypes import DType
from dcpconv.engine.values import put_values, wide

_BLOCK = 128 << 10
"""Elements per call: those of both sides and their difference stay in a core's cache, and a call
costs little beside what it does."""

_ROW = 8 << 10
"""Elements that are added up in their own type before the sums are in fp64: BLAS starts threads for
longer ones, and loses digits."""

_Values = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Measured:
    """How far apart a and b are.

    Attributes:
        numel: Elements.
        differing: Elements of unequal value; two NaNs are equal.
        max_abs: Largest |a-b|; infinite where only one side is finite or a number.
        at: Index of that element, in C order; -1 where none differs.
        sum_abs: Sum of |a-b|.
        squares: Sums of a*a, b*b and (a-b)*(a-b).
    """

    numel: int
    differing: int
    max_abs: float
    at: int
    sum_abs: float
    squares: tuple[float, float, float]

    @property
    def mean_abs(self) -> float:
        """Mean |a-b|."""
        return self.sum_abs / self.numel if self.numel else 0.0

    @property
    def relative(self) -> float:
        """Norm of a-b by the norm of a; infinite where a is zero and b is not."""
        return _ratio(self.squares[2], self.squares[0])

    @property
    def norm_ratio(self) -> float:
        """Norm of b by the norm of a."""
        return _ratio(self.squares[1], self.squares[0])

    @property
    def cosine(self) -> float:
        """Of the angle between a and b; NaN where one of them is zero."""
        one, other, apart = self.squares
        norms = math.sqrt(one * other)
        return max(-1.0, min(1.0, (one + other - apart) / 2 / norms)) if norms else math.nan


def joined(parts: Iterable[Measured]) -> Measured:
    """All parts of a tensor as one."""
    parts = list(parts)
    worst = max(parts, key=lambda part: part.max_abs)
    return Measured(
        sum(part.numel for part in parts),
        sum(part.differing for part in parts),
        worst.max_abs,
        worst.at,
        math.fsum(part.sum_abs for part in parts),
        (
            math.fsum(part.squares[0] for part in parts),
            math.fsum(part.squares[1] for part in parts),
            math.fsum(part.squares[2] for part in parts),
        ),
    )


class Measure:
    """What one thread measures with: room for a block of either side and for their difference."""

    def __init__(self) -> None:
        self._rooms: dict[str, _Room] = {}

    def __call__(
        self, one: memoryview, other: memoryview, *, dtypes: tuple[DType, DType], first: int
    ) -> Measured:
        """How far apart two buffers are.

        Args:
            one: Elements of the first type.
            other: As many elements of the second.
            dtypes: Their types.
            first: Index of their first element in the tensor.
        """
        numel = len(one) // dtypes[0].itemsize
        if not numel:
            return Measured(0, 0, 0.0, -1, 0.0, (0.0, 0.0, 0.0))
        kind = wide(dtypes)
        room = self._rooms.get(kind) or self._rooms.setdefault(kind, _Room(kind))
        width = 2 if any(dtype.name.startswith("complex") for dtype in dtypes) else 1
        step = _BLOCK // width
        return joined(
            room.measured(
                [
                    memoryview(view)[start * dtype.itemsize : (start + step) * dtype.itemsize]
                    for view, dtype in zip((one, other), dtypes, strict=True)
                ],
                dtypes,
                first + start,
                width,
            )
            for start in range(0, numel, step)
        )


class _Room:
    def __init__(self, kind: str) -> None:
        self.a, self.b, self.apart = np.zeros((3, _BLOCK), kind)
        self.ones = np.ones((_ROW, 1), kind)
        self.sums = np.empty((4, _BLOCK // _ROW, 1, 1), kind)

    def measured(
        self, views: list[memoryview], dtypes: tuple[DType, DType], first: int, width: int
    ) -> Measured:
        """A block of either side, in as few passes as will do: each takes as long as reading it."""
        a, b, apart = self.a, self.b, self.apart
        numel = len(views[0]) // dtypes[0].itemsize * width
        for view, dtype, values in zip(views, dtypes, (a, b), strict=True):
            put_values(view, dtype, values[:numel], width=width)
            values[numel:] = 0
        with np.errstate(all="ignore"):
            np.subtract(a, b, out=apart)
            for values, rows in zip((a, b, apart), self.sums, strict=False):
                _multiply(values, values.reshape(-1, _ROW, 1), into=rows)
            if not np.isfinite(self.sums[2]).all():
                apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
                np.nan_to_num(apart, copy=False, nan=np.inf, posinf=np.inf, neginf=-np.inf)
            np.abs(apart, out=apart)
            if dtypes[0] is dtypes[1] and dtypes[0].name in {"int64", "uint64"}:
                apart[:numel] = _distances(*(np.frombuffer(view, dtypes[0].name) for view in views))
            _multiply(apart, self.ones, into=self.sums[3])
            *squares, total = self.sums.sum(axis=1, dtype=np.float64).flat
        at = int(apart.argmax())
        largest = float(apart[at])
        # Without their signs, numbers are zero where their bits are; integers are counted faster.
        unequal = apart[:numel].view(f"i{apart.itemsize}").reshape(-1, width)
        count = int(np.count_nonzero(unequal.any(axis=1) if width > 1 else unequal))
        place = first + at // width if largest > 0 else -1
        one, other, moved = map(float, squares)
        return Measured(numel // width, count, largest, place, float(total), (one, other, moved))


def _multiply(values: _Values, by: _Values, *, into: _Values) -> None:
    """The sums of products, row by row."""
    np.matmul(values.reshape(-1, 1, _ROW), by, out=into)


def _distances(a: _Values, b: _Values) -> _Values:
    """Of integers that fp64 may not tell apart."""
    return np.where(a > b, _unsigned(a) - _unsigned(b), _unsigned(b) - _unsigned(a))


def _unsigned(values: _Values) -> _Values:
    return values.view(np.uint64)


def _ratio(above: float, below: float) -> float:
    if below:
        return math.sqrt(above / below)
    return math.inf if above else math.nan
