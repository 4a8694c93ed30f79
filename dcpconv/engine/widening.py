"""bf16 widened to fp32, which torch takes a second to be imported for."""

from __future__ import annotations

import numpy as np


def widen(source: memoryview, into: memoryview) -> None:
    """Widen every element, bit for bit what torch does: a bf16 is the upper half of an fp32.

    Args:
        source: Elements of bf16.
        into: As many of fp32, writable memory.
    """
    halves = np.frombuffer(source, np.uint16)
    np.left_shift(halves, 16, out=np.frombuffer(into, np.uint32), dtype=np.uint32)
