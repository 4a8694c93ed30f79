"""Element types, under torch's names, with what each form calls them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: Attribute of the torch module: ``bfloat16`` for ``torch.bfloat16``.
        itemsize: Bytes per element.
        safetensors: Code in a safetensors header, or ``None`` where the format has none.
        storage: Class in the torch module that ``torch.save`` names for it, or ``None`` where it
            writes an untyped storage and carries the dtype in ``_rebuild_tensor_v3``.
        label: Short name for tables: ``bf16``.
        packed: Numbers in one element; safetensors counts them in the last dim, torch does not.

    Source:
        safetensors 0.8 ``safetensors/src/tensor.rs`` (codes); torch 2.13 ``torch/storage.py``
        ``_dtype_to_storage_type_map`` (storage classes).
    """

    name: str
    itemsize: int
    safetensors: str | None
    storage: str | None
    label: str
    packed: int = 1

    @property
    def is_floating_point(self) -> bool:
        """Whether a ``--dtype`` cast applies to it: integers and bool are never cast unasked, and
        packed numbers mean nothing without the factors beside them."""
        return self.name.startswith(("float", "bfloat")) and self.packed == 1

    def __str__(self) -> str:
        return self.label


_TABLE = (
    DType("float64", 8, "F64", "DoubleStorage", "fp64"),
    DType("float32", 4, "F32", "FloatStorage", "fp32"),
    DType("float16", 2, "F16", "HalfStorage", "fp16"),
    DType("bfloat16", 2, "BF16", "BFloat16Storage", "bf16"),
    DType("int64", 8, "I64", "LongStorage", "i64"),
    DType("int32", 4, "I32", "IntStorage", "i32"),
    DType("int16", 2, "I16", "ShortStorage", "i16"),
    DType("int8", 1, "I8", "CharStorage", "i8"),
    DType("uint8", 1, "U8", "ByteStorage", "u8"),
    DType("bool", 1, "BOOL", "BoolStorage", "bool"),
    DType("uint16", 2, "U16", None, "u16"),
    DType("uint32", 4, "U32", None, "u32"),
    DType("uint64", 8, "U64", None, "u64"),
    DType("float8_e4m3fn", 1, "F8_E4M3", None, "f8e4m3"),
    DType("float8_e5m2", 1, "F8_E5M2", None, "f8e5m2"),
    DType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ", None, "f8e4m3fnuz"),
    DType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ", None, "f8e5m2fnuz"),
    DType("float8_e8m0fnu", 1, "F8_E8M0", None, "f8e8m0"),
    DType("float4_e2m1fn_x2", 1, "F4", None, "f4e2m1x2", packed=2),
    DType("complex64", 8, "C64", "ComplexFloatStorage", "c64"),
    DType("complex128", 16, None, "ComplexDoubleStorage", "c128"),
)

FP4 = DType("float4_e2m1fn", 1, None, None, "f4e2m1")
"""Two elements to a byte, the first in its low half: as they are read, each one is its whole byte,
and ``Part.half`` says which half of it counts.  No file names this type: it is told by keys.

Source:
    transformers 5.23 ``integrations/mxfp4.py``; compressed-tensors 0.20 ``mxfp4``.
"""

BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors}
BY_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}
BY_LABEL = {dtype.label: dtype for dtype in _TABLE}


def dtype_named(text: str) -> DType | None:
    """The type that a label (``bf16``) or torch's name (``torch.bfloat16``) means."""
    return BY_LABEL.get(text) or BY_NAME.get(text.removeprefix("torch."))
