"""What elements are worth, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.engine.values import put_values, wide
from support.versions import of_torch

PLAIN = [of_torch(dtype.name, dtype) for dtype in BY_NAME.values() if dtype.packed == 1]


@pytest.mark.parametrize("one", PLAIN, ids=str)
@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_every_code_is_worth_what_torch_says(one: DType, kind: str) -> None:
    """All 256 codes of one byte, all 65,536 of two, and random ones of more."""
    if one.name == "bool":
        codes = np.array([0, 1], np.uint8)
    elif one.itemsize <= 2:
        codes = np.arange(256**one.itemsize, dtype=f"u{one.itemsize}")
    else:
        codes = np.random.default_rng(3).integers(0, 256, 4096 * one.itemsize, np.uint8)
    data = bytearray(codes.tobytes())
    stored = torch.frombuffer(data, dtype=getattr(torch, one.name))
    is_complex = one.name.startswith("complex")
    if is_complex:
        stored = torch.view_as_real(stored).flatten()
    expected = stored.to(torch.float64) if kind == "f8" else stored.to(torch.float32)

    found = np.full(len(expected), 7, kind)
    with np.errstate(all="ignore"):
        put_values(memoryview(data), one, found, width=2 if is_complex else 1)

    assert np.array_equal(found, expected.numpy(), equal_nan=True)


def test_a_real_number_beside_complex_ones_has_no_imaginary_part() -> None:
    found = np.full(4, 7.0)
    put_values(memoryview(np.array([1, -2], "f4").tobytes()), BY_NAME["float32"], found, width=2)
    assert found.tolist() == [1, 0, -2, 0]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("bfloat16", "float32"), "f4"),
        (("int16", "float8_e5m2"), "f4"),
        (("int32", "int32"), "f8"),
        (("float16", "float64"), "f8"),
        (("complex64", "float32"), "f8"),
    ],
)
def test_the_type_to_compute_in_holds_both(names: tuple[str, str], kind: str) -> None:
    assert wide(BY_NAME[name] for name in names) == kind
