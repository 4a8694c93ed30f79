"""cast() against torch, and its counts against counting one by one."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dcpconv.core.dtypes import BY_NAME
from dcpconv.engine.cast import cast
from support.versions import of_torch

FLOATS = [of_torch(name) for name, dtype in BY_NAME.items() if dtype.is_floating_point]
SPECIAL = [
    *(0.0, -0.0, 1.0, -2.5, 1e-45, 1e-8, 460.0, 464.0, 465.0, 6e4, 65519.0, 65520.0, -1e30, 3.4e38),
    *(math.inf, -math.inf, math.nan),
]
SATURATES = {"float8_e4m3fn": 464.0}
"""Types that torch 2.13 clamps to, and the first value that would have rounded beyond them."""


def stored(values: torch.Tensor) -> bytearray:
    return bytearray(values.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_bytes_and_counts_match_torch(source: str, target: str) -> None:
    rng = random.Random(0)
    numbers = [rng.gauss(0, 10 ** rng.uniform(-9, 9)) for _ in range(40_000)]
    values = torch.tensor([*SPECIAL, *numbers], dtype=torch.float64)
    before = values.to(getattr(torch, source))
    after = before.to(getattr(torch, target))

    data = stored(before)
    into = bytearray(len(before) * BY_NAME[target].itemsize)
    counts = cast(
        memoryview(data),
        memoryview(into),
        source_dtype=BY_NAME[source],
        target_dtype=BY_NAME[target],
    )

    assert into == stored(after)
    old, new = before.double(), after.double()
    beyond = ~new.isfinite() | (old.abs() > SATURATES.get(target, math.inf))
    overflowed = int((old.isfinite() & beyond).sum())
    underflowed = int(((old != 0) & (new == 0)).sum())
    assert counts == (overflowed, underflowed)


def test_nothing_is_nothing() -> None:
    f32 = BY_NAME["float32"]

    assert cast(
        memoryview(bytearray()), memoryview(bytearray()), source_dtype=f32, target_dtype=f32
    ) == (0, 0)
