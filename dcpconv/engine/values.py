"""The values of elements of any type, as numpy can compute with them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from dcpconv.core.dtypes import DType

_BYTES = {
    "float8_e4m3fn": (4, 3, 7),
    "float8_e5m2": (5, 2, 15),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2fnuz": (5, 2, 16),
}
"""Bits of exponent and of mantissa, and the bias of the exponent.

Source: OCP 8-bit Floating Point Specification 1.0; for ``fnuz``, "8-bit Numerical Formats for Deep
Neural Networks" (arXiv:2206.02915).
"""

_Values = np.ndarray[Any, np.dtype[Any]]


def wide(dtypes: Iterable[DType]) -> str:
    """The type that holds what elements of some types are worth: ``f4``, or ``f8`` where some do
    not fit."""
    is_wide = any(
        dtype.itemsize > 4 or (dtype.itemsize == 4 and "int" in dtype.name) for dtype in dtypes
    )
    return "f8" if is_wide else "f4"


def put_values(data: memoryview, dtype: DType, into: _Values, *, width: int = 1) -> None:
    """Put the values of elements where they can be computed with.

    Args:
        data: The elements; packed ones count as the byte that holds them.
        dtype: Their type.
        into: As many of ``wide``, or twice as many where ``width`` is 2.
        width: Numbers per element: 2 for a real and an imaginary part, of real ones too.
    """
    if width == 2:
        pairs = into.reshape(-1, 2)
        if dtype.name.startswith("complex"):
            pairs[:] = np.frombuffer(data, f"f{dtype.itemsize // 2}").reshape(-1, 2)
        else:
            pairs[:, 1] = 0
            put_values(data, dtype, pairs[:, 0])
    elif dtype.name == "bfloat16":
        stored = np.frombuffer(data, np.uint16)
        if into.dtype == np.float32 and into.flags.c_contiguous:
            bits = into.view(np.uint32)
            np.copyto(bits, stored)
            np.left_shift(bits, 16, out=bits)
        else:
            into[:] = (stored.astype(np.uint32) << 16).view(np.float32)
    elif dtype.name.startswith("float8"):
        into[:] = _table(dtype.name)[np.frombuffer(data, np.uint8)]
    else:
        name = "uint8" if dtype.packed > 1 else dtype.name
        np.copyto(into, np.frombuffer(data, name), casting="unsafe")


@cache
def _table(name: str) -> _Values:
    """What each of the 256 codes of a type of one byte is worth."""
    if name == "float8_e8m0fnu":
        # Source: OCP Microscaling Formats (MX) 1.0, section 5.4.1
        return np.array([*(2.0 ** (code - 127) for code in range(255)), np.nan], np.float32)
    return np.array([_worth(code, name) for code in range(256)], np.float32)


def _worth(code: int, name: str) -> float:
    exponent_bits, mantissa_bits, bias = _BYTES[name]
    sign = -1.0 if code >> 7 else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    if name.endswith("fnuz"):
        if code == 0x80:
            return np.nan
    elif name == "float8_e4m3fn":
        if code & 0x7F == 0x7F:
            return np.nan
    elif exponent == (1 << exponent_bits) - 1:
        return np.nan if mantissa else sign * np.inf
    is_normal = exponent > 0
    fraction = mantissa / (1 << mantissa_bits) + is_normal
    return sign * fraction * 2.0 ** ((exponent or 1) - bias)
