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
"""Elements per call: those of both sides stay in a core's cache, and a call costs little beside
what it does."""

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
    """What one thread measures with: room for a block of either side."""

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
        if not len(one):
            return Measured(0, 0, 0.0, -1, 0.0, (0.0, 0.0, 0.0))
        kind = wide(dtypes)
        room = self._rooms.get(kind) or self._rooms.setdefault(kind, _Room(kind))
        return room.measured((one, other), dtypes, first)


class _Room:
    def __init__(self, kind: str) -> None:
        self.a, self.b = np.zeros((2, _BLOCK), kind)
        self.ones = np.ones((_ROW, 1), kind)

    def measured(
        self, views: tuple[memoryview, memoryview], dtypes: tuple[DType, DType], first: int
    ) -> Measured:
        """Both sides, block by block, in as few passes as will do: each takes as long as reading
        them."""
        width = 2 if any(dtype.name.startswith("complex") for dtype in dtypes) else 1
        numel = len(views[0]) // dtypes[0].itemsize
        step = _BLOCK // width
        sums = np.empty((4, -(-numel * width // _ROW), 1, 1), self.a.dtype)
        largest, at, count = 0.0, -1, 0
        for start in range(0, numel, step):
            stop = min(start + step, numel)
            both = [
                view[start * dtype.itemsize : stop * dtype.itemsize]
                for view, dtype in zip(views, dtypes, strict=True)
            ]
            apart = self._apart(both, dtypes, sums[:, start * width // _ROW :], width)
            place = int(apart.argmax())
            if apart[place] > largest:
                largest, at = float(apart[place]), first + start + place // width
            # Without their signs, numbers are zero where their bits are; integers are counted
            # faster.
            unequal = apart.view(f"i{apart.itemsize}")
            some = unequal.reshape(-1, 2).any(axis=1) if width == 2 else unequal
            count += int(np.count_nonzero(some))
        one, other, squares, total = map(float, sums.sum(axis=1, dtype=np.float64).flat)
        return Measured(numel, count, largest, at, total, (one, other, squares))

    def _apart(
        self, views: list[memoryview], dtypes: tuple[DType, DType], sums: _Values, width: int
    ) -> _Values:
        """The distances of a block, and zeros up to the end of its last row.

        Args:
            views: At most a block of either side.
            dtypes: Their types.
            sums: Takes those of the squares of both and of their difference, and of the distances,
                a row each.
            width: Numbers per element.
        """
        numel = len(views[0]) // dtypes[0].itemsize * width
        rows = -(-numel // _ROW)
        a, b = self.a[: rows * _ROW], self.b[: rows * _ROW]
        for view, dtype, values in zip(views, dtypes, (a, b), strict=True):
            put_values(view, dtype, values[:numel], width=width)
            values[numel:] = 0
        with np.errstate(all="ignore"):
            for values, into in zip((a, b), sums, strict=False):
                _multiply(values, values.reshape(-1, _ROW, 1), into=into[:rows])
            apart = np.subtract(a, b, out=a)  # two arrays stay in a core's cache, three do not
            _multiply(apart, apart.reshape(-1, _ROW, 1), into=sums[2][:rows])
            if not np.isfinite(sums[2][:rows]).all():
                again = np.empty_like(apart[:numel])
                put_values(views[0], dtypes[0], again, width=width)
                other = b[:numel]
                apart[:numel][(again == other) | (np.isnan(again) & np.isnan(other))] = 0
                np.nan_to_num(apart, copy=False, nan=np.inf, posinf=np.inf, neginf=-np.inf)
            np.abs(apart, out=apart)
            if dtypes[0] is dtypes[1] and dtypes[0].name in {"int64", "uint64"}:
                apart[:numel] = _distances(*(np.frombuffer(view, dtypes[0].name) for view in views))
            _multiply(apart, self.ones, into=sums[3][:rows])
        return apart


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
