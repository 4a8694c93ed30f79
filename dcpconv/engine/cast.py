"""Change the element type of a buffer; the only part of a conversion that computes.

torch is imported when the first element is cast, so that a lossless conversion never pays for it;
bf16 is widened to fp32 without it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from dcpconv.core.dtypes import BY_NAME, FP4, DType
from dcpconv.core.outline import BlockScale, Part

if TYPE_CHECKING:
    from torch import Tensor

STEP = 32 << 10
"""Elements per torch call: torch starts its own threads above this, and every temporary is this
long."""

_FLOAT32 = BY_NAME["float32"]

_FP4_VALUES = [
    sign * magnitude
    for sign in (1.0, -1.0)
    for magnitude in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
]
"""What the 16 codes of four bits mean: a sign, two bits of exponent, one of mantissa.

Source: OCP Microscaling Formats (MX) 1.0, section 5.3.3.
"""

_EXPONENT_BIAS = 127
"""Of scales that are exponents.  Source: OCP Microscaling Formats (MX) 1.0, section 5.4.1."""


def cast(
    source: memoryview, into: memoryview, *, source_dtype: DType, target_dtype: DType
) -> tuple[int, int]:
    """Cast every element of ``source`` into ``into``, rounding to nearest.

    Args:
        source: Elements of ``source_dtype``, writable memory.
        into: As many elements of ``target_dtype``.
        source_dtype: Element type to read.
        target_dtype: Element type to write.

    Returns:
        ``(overflowed, underflowed)``: finite values beyond the target type, which became infinite,
        NaN or its largest value (``float8_e4m3fn``, in some versions of torch), and nonzero values
        that became zero.
    """
    if not len(source):
        return 0, 0
    if (source_dtype.name, target_dtype.name) == ("bfloat16", "float32"):
        from dcpconv.engine.widening import widen  # noqa: PLC0415 - imports numpy

        widen(source, into)
        return 0, 0
    import torch  # noqa: PLC0415 - only a cast needs it

    values = torch.frombuffer(source, dtype=getattr(torch, source_dtype.name))
    result = torch.frombuffer(into, dtype=getattr(torch, target_dtype.name))
    risk = _risk(source_dtype, target_dtype)
    overflowed = underflowed = 0
    for start in range(0, len(values), STEP):
        over, under = _put(values[start : start + STEP], result[start : start + STEP], risk)
        overflowed += over
        underflowed += under
    return overflowed, underflowed


def tensor(buffer: memoryview, dtype: DType) -> Tensor:
    """The elements of a buffer, flat, as torch sees them."""
    import torch  # noqa: PLC0415 - only a cast needs it

    return torch.frombuffer(buffer, dtype=getattr(torch, dtype.name))


def dequantise(
    source: memoryview,
    into: memoryview,
    *,
    source_dtype: DType,
    target_dtype: DType,
    part: Part,
    scale: BlockScale,
    factors: memoryview,
    first: int,
) -> tuple[int, int]:
    """Multiply a part of a matrix by the factors of its blocks, in fp32, and cast the products.

    Args:
        source: Elements of ``source_dtype``, writable memory.
        into: As many elements of ``target_dtype``.
        source_dtype: Element type to read.
        target_dtype: Element type to write.
        part: Which elements, ``STEP`` at most: its target is their place in both buffers, its
            source their place in the matrix.
        scale: What the blocks are.
        factors: Factors in C order, as stored; all that the part needs.
        first: Which of the matrix's factors comes first in ``factors``.

    Returns:
        As ``cast``, of the products.

    Source:
        ``weight_dequant`` of deepseek-ai/DeepSeek-V3 ``inference/kernel.py``; for exponents,
        ``convert_moe_packed_tensors`` of transformers 5.23 ``integrations/mxfp4.py``.
    """
    import torch  # noqa: PLC0415 - only a cast needs it

    is_packed = source_dtype is FP4
    kind = torch.uint8 if is_packed else getattr(torch, source_dtype.name)
    values = torch.frombuffer(source, dtype=kind)
    result = torch.frombuffer(into, dtype=getattr(torch, target_dtype.name))
    factor = torch.frombuffer(factors, dtype=getattr(torch, scale.factors_dtype.name))
    place = torch.tensor(scale.element(part, source_dtype.itemsize))
    for count, step, _ in part.loops:
        place = place.unsqueeze(-1) + step * scale.packed * torch.arange(count)
    block = _factor_of(scale, place) - first
    counts, steps = [loop[0] for loop in part.loops], [loop[2] for loop in part.loops]
    before = values.as_strided(counts, steps, part.target)
    if is_packed:
        codes = before >> 4 if part.half else before & 0x0F
        before = torch.tensor(_FP4_VALUES)[codes.int()]
    before = before.float()
    if factor.dtype is torch.uint8:
        products = torch.ldexp(before, factor[block].int() - _EXPONENT_BIAS)
    else:
        products = before * factor.float()[block]
    after = result.as_strided(counts, steps, part.target)
    return _put(products, after, _risk(_FLOAT32, target_dtype))


def _factor_of(scale: BlockScale, place: Tensor) -> Tensor:
    """``BlockScale.factor`` of many elements at once."""
    down, across = scale.block
    blocks_down, blocks_across = scale.factors_shape
    row, column = place // scale.columns, place % scale.columns
    rows = scale.rows or scale.numel  # of one matrix: more than it has
    above = row // rows * blocks_down
    return (above + row % rows // down) * blocks_across + column // across


def _put(before: Tensor, after: Tensor, risk: _Risk) -> tuple[int, int]:
    """Cast ``before`` into ``after``; returns what ``cast`` does."""
    overflowed = underflowed = 0
    after.copy_(before)
    if risk.overflow or risk.underflow:
        # Types of one byte have few operators of their own; both widenings are exact.
        before = before.float() if before.element_size() == 1 else before
        after = after.float() if after.element_size() == 1 else after
        # One look tells for nearly all weights that nothing was lost; counting costs ten times.
        low, high = (float(edge) for edge in after.abs().aminmax())
        if risk.overflow and not high < risk.largest:  # also where one is NaN
            lost = ~after.isfinite() | (before.abs() > risk.limit)
            overflowed = int((lost & before.isfinite()).sum())
        if risk.underflow and not low > 0:
            underflowed = int(before.count_nonzero()) - int(after.count_nonzero())
    return overflowed, underflowed


class _Risk(NamedTuple):
    """What can happen to a value; beyond ``limit`` it is clamped to ``largest``."""

    overflow: bool
    underflow: bool
    largest: float
    limit: float


@cache
def _risk(source: DType, target: DType) -> _Risk:
    import torch  # noqa: PLC0415 - only a cast needs it

    if not (source.is_floating_point and target.is_floating_point):
        return _Risk(overflow=False, underflow=False, largest=math.inf, limit=math.inf)
    old = torch.finfo(getattr(torch, source.name))
    new = torch.finfo(getattr(torch, target.name))
    return _Risk(
        overflow=old.max > new.max or old.min < new.min,
        # e8m0 has no zero
        underflow=target.name != "float8_e8m0fnu" and old.tiny * old.eps < new.tiny * new.eps,
        largest=new.max,
        # every other type turns to infinity or NaN by itself
        limit=464.0 if target.name == "float8_e4m3fn" else math.inf,
    )
