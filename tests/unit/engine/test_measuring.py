"""How far apart two buffers are, against sums of integers, which are exact in any order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.engine.measuring import _BLOCK, _ROW, Measure, Measured

NUMELS = [1, 2, _ROW - 1, _ROW, _ROW + 1, _BLOCK, _BLOCK + 3, 2 * _BLOCK + _ROW + 5]


def bytes_of(values: np.ndarray[Any, np.dtype[Any]], dtype: DType) -> memoryview:
    """The values as elements of a type, by torch."""
    stored = torch.from_numpy(values.copy()).to(getattr(torch, dtype.name))
    return memoryview(stored.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.fixture
def numbers() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "int8"),
        ("float64", "float64"),
        ("int64", "int64"),
        ("complex64", "complex64"),
        ("float32", "complex64"),
    ],
)
def test_sums_of_integers_are_exact(
    one: str, other: str, numel: int, numbers: np.random.Generator
) -> None:
    """No row's sum of squares reaches 2**24, so that fp32 holds every one of them."""
    a, b = numbers.integers(-22, 22, (2, numel)).astype("f8")
    a[: numel // 3] = b[: numel // 3]
    dtypes = BY_NAME[one], BY_NAME[other]

    found = Measure()(bytes_of(a, dtypes[0]), bytes_of(b, dtypes[1]), dtypes=dtypes, first=1000)

    apart = np.abs(a - b)
    largest = float(apart.max())
    assert found == Measured(
        numel,
        int((apart > 0).sum()),
        largest,
        1000 + int(apart.argmax()) if largest else -1,
        float(apart.sum()),
        (float((a * a).sum()), float((b * b).sum()), float((apart * apart).sum())),
    )


def test_a_buffer_is_not_what_was_measured_before(numbers: np.random.Generator) -> None:
    """Rooms are used again, by longer and by shorter buffers."""
    measure = Measure()
    dtype = BY_NAME["bfloat16"]
    for numel in (*NUMELS, *reversed(NUMELS)):
        a, b = numbers.integers(-22, 22, (2, numel)).astype("f8")
        views = bytes_of(a, dtype), bytes_of(b, dtype)
        found = measure(*views, dtypes=(dtype, dtype), first=0)
        assert found == Measure()(*views, dtypes=(dtype, dtype), first=0)
        assert found.squares[0] == (a * a).sum()


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        (math.nan, math.nan, 0.0),
        (math.inf, math.inf, 0.0),
        (math.inf, -math.inf, math.inf),
        (math.nan, 1.0, math.inf),
        (1.0, -math.inf, math.inf),
        (0.0, -0.0, 0.0),
    ],
)
@pytest.mark.parametrize("at", [0, _ROW + 1, _BLOCK + 1])
@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_what_is_no_finite_number(name: str, at: int, a: float, b: float, distance: float) -> None:
    dtype = BY_NAME[name]
    one, other = np.ones((2, _BLOCK + _ROW))
    one[at], other[at], other[5] = a, b, 3.0

    found = Measure()(bytes_of(one, dtype), bytes_of(other, dtype), dtypes=(dtype, dtype), first=0)

    assert found.differing == 1 + (distance > 0)
    assert found.max_abs == (distance or 2.0)
    assert found.at == (at if distance else 5)
