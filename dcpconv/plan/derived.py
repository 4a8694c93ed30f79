"""Tensors that a family stores although they follow from the config."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from dcpconv.core.dtypes import BY_LABEL, DType
from dcpconv.core.errors import SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.plan.coverage import Target

_CODES = {"fp64": "d", "fp32": "f", "fp16": "e"}


def derive(
    rule: str,
    key: str,
    *,
    spec: ModelSpec | None,
    shape: tuple[int, ...] | None,
    dtype: DType | None,
) -> Target:
    """The target tensor that ``rule`` makes.

    Args:
        rule: ``zeros``, in fp32 whatever the weights are: a bias that takes part in no product;
            or ``inv_freq``, the turning frequencies of RoPE in the type of the weights.
        key: Of the target.
        spec: The model's numbers.
        shape: Of the target, where a row of the table says.
        dtype: Element type of the weights.

    Raises:
        SpecError: ``inv_freq`` without a config.
    """
    if rule == "zeros":
        shape = shape or ()
        return Target(key, shape, BY_LABEL["fp32"], (), values=(0.0,) * math.prod(shape))
    if spec is None:
        raise SpecError(
            "a tensor follows from numbers that only a config holds",
            [("key", key), ("needs", "rope_theta, head_dim, partial_rotary_factor")],
            hint="--assets DIR names a config",
        )
    turned = int(spec.head_dim * spec.partial_rotary_factor)
    # Rounded after every step, as torch computes 1 / theta ** (arange / turned) in fp32.
    values = tuple(
        _fp32(1.0 / _fp32(_fp32(spec.rope_theta) ** _fp32(at / turned)))
        for at in range(0, turned, 2)
    )
    return Target(key, (len(values),), dtype or BY_LABEL["fp32"], (), values=values)


def _fp32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def encode(values: Sequence[float], dtype: DType) -> bytes:
    """Little-endian bytes of ``values``, rounded to nearest, ties to even.

    >>> encode([1.0, -2.0], BY_LABEL["bf16"]).hex()
    '803f00c0'
    """
    if dtype.label != "bf16":
        return struct.pack(f"<{len(values)}{_CODES[dtype.label]}", *values)
    words = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
    rounded = ((word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in words)
    return struct.pack(f"<{len(values)}H", *rounded)
