"""How far apart two runs of values are: the only part of a comparison that needs torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpconv.core.dtypes import DType
from dcpconv.engine.cast import tensor

_BLOCK = 32 << 10
"""Elements per torch call: torch starts its own threads above this, and every temporary is this
long."""


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


def measured(
    one: memoryview,
    other: memoryview,
    *,
    dtypes: tuple[DType, DType],
    first: int,
    seen: float = 0.0,
) -> Measured:
    """How far apart two buffers are.

    Args:
        one: Elements of the first type, writable memory.
        other: As many elements of the second.
        dtypes: Their types.
        first: Index of their first element in the tensor.
        seen: A difference that was found elsewhere: where a smaller one is does not matter.
    """
    if not len(one):
        return Measured(0, 0, 0.0, -1, 0.0, (0.0, 0.0, 0.0))
    is_wide = any(dtype.itemsize > 4 for dtype in dtypes)
    kind = torch.float64 if is_wide else torch.float32
    both = [_values(view, dtype) for view, dtype in zip((one, other), dtypes, strict=True)]
    width = 2 if both[0].is_complex() or both[1].is_complex() else 1
    if width == 2:
        both = [torch.view_as_real(values.to(torch.complex128)).flatten() for values in both]
    room = torch.empty(4, min(_BLOCK, len(both[0])), dtype=kind)
    parts = []
    for start in range(0, len(both[0]), _BLOCK):
        part = _block(both, start, room, first, width, seen)
        seen = max(seen, part.max_abs)
        parts.append(part)
    return joined(parts)


def _values(view: memoryview, dtype: DType) -> Tensor:
    if dtype.packed > 1:
        return torch.frombuffer(view, dtype=torch.uint8)
    return tensor(view, dtype)


def _block(
    both: list[Tensor], start: int, room: Tensor, first: int, width: int, seen: float
) -> Measured:
    """A block of either side, in as few passes as will do: each takes as long as reading it."""
    numel = min(len(both[0]) - start, room.shape[1])
    a, b, apart, spare = room[:, :numel]
    a.copy_(both[0][start : start + numel])
    b.copy_(both[1][start : start + numel])
    torch.sub(a, b, out=apart)
    squares = (_square(a, spare), _square(b, spare), _square(apart, spare))
    if not math.isfinite(squares[2]):
        apart[(a == b) | (a.isnan() & b.isnan())] = 0.0
        apart.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    largest = float(apart.abs_().amax())
    place = -1
    if largest > 0 and largest >= seen:
        place = (first * width + start + int(apart.argmax())) // width
    total = float(apart.sum())
    # Of signs, since counting what is not zero takes twice as long; exact, as blocks are short.
    signs = apart.sign_() if width == 1 else apart.sign_().view(-1, width).amax(1)
    return Measured(numel // width, int(signs.sum()), largest, place, total, squares)


def _square(values: Tensor, spare: Tensor) -> float:
    """Sum of squares; ``dot`` is faster and ten times less exact, as it does not add in pairs."""
    return float(torch.mul(values, values, out=spare).sum())


def _ratio(above: float, below: float) -> float:
    if below:
        return math.sqrt(above / below)
    return math.inf if above else math.nan
