"""Change the element type of a buffer; the only part of a conversion that computes.

torch is imported when the first element is cast, so that a lossless conversion never pays for it.
"""

from __future__ import annotations

from functools import cache

from dcpconv.dtypes import DType

_STEP = 32 << 10
"""Elements per torch call: torch starts its own threads above this, and every temporary is this
long."""


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
        ``(overflowed, underflowed)``: finite values that became infinite or NaN, and nonzero
        values that became zero.
    """
    import torch  # noqa: PLC0415 - only a cast needs it

    if not len(source):
        return 0, 0
    values = torch.frombuffer(source, dtype=getattr(torch, source_dtype.name))
    result = torch.frombuffer(into, dtype=getattr(torch, target_dtype.name))
    may_overflow, may_underflow = _risks(source_dtype, target_dtype)
    overflowed = underflowed = 0
    for start in range(0, len(values), _STEP):
        before, after = values[start : start + _STEP], result[start : start + _STEP]
        after.copy_(before)
        if may_overflow or may_underflow:
            # Types of one byte have few operators of their own; both widenings are exact.
            before = before.float() if source_dtype.itemsize == 1 else before
            after = after.float() if target_dtype.itemsize == 1 else after
        if may_overflow:
            finite = int(after.isfinite().sum())
            if finite < len(after):
                overflowed += int(before.isfinite().sum()) - finite
        if may_underflow:
            underflowed += int(before.count_nonzero()) - int(after.count_nonzero())
    return overflowed, underflowed


@cache
def _risks(source: DType, target: DType) -> tuple[bool, bool]:
    """Whether a value of ``source`` can be too large, or too small, for ``target``."""
    import torch  # noqa: PLC0415 - only a cast needs it

    if not (source.is_floating_point and target.is_floating_point):
        return False, False
    old = torch.finfo(getattr(torch, source.name))
    new = torch.finfo(getattr(torch, target.name))
    return old.max > new.max, old.tiny * old.eps < new.tiny * new.eps
