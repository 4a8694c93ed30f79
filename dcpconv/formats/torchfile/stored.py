"""Tensors as a ``torch.save`` archive has them: where their bytes lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from dcpconv.core.dtypes import DType
from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.stand_ins import Call, Ref


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of an archive, as the bytes it lies in.

    Attributes:
        storage_key: Record ``data/<storage_key>``.
        dtype: Element type.
        offset_elements: First element, from the start of the storage.
        shape: In elements.
        strides: In elements, all at least 0.
        offset: Byte of the first element, from the start of the archive.
        nbytes: From the first to the last element, both included; 0 for an empty tensor.
        requires_grad: As saved.
        is_parameter: Whether it was an ``nn.Parameter``.
    """

    storage_key: str
    dtype: DType
    offset_elements: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    nbytes: int
    requires_grad: bool = False
    is_parameter: bool = False

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in C order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    def moved(self, nbytes: int) -> StoredTensor:
        """The same tensor, so many bytes further on."""
        return StoredTensor(
            self.storage_key,
            self.dtype,
            self.offset_elements,
            self.shape,
            self.strides,
            self.offset + nbytes,
            self.nbytes,
            self.requires_grad,
            self.is_parameter,
        )

    def __setstate__(self, state: object) -> NoReturn:
        # Without this a BUILD opcode could move a tensor after its bounds were checked.
        raise FormatError("a pickle may not change a tensor that it has made")

    def __reduce__(self) -> tuple[object, ...]:
        return (StoredTensor, tuple(getattr(self, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class UnreadableTensor:
    """A tensor of a kind that is not one box of raw bytes: sparse, quantized, without data."""

    kind: str

    def __setstate__(self, state: object) -> None:
        """Forget ``state``: there is nothing here to change."""


def whole_numbers(value: object) -> tuple[int, ...] | None:
    """``value`` as a shape, or ``None`` where it is not one."""
    if isinstance(value, Call) and value.func == Ref("torch", "Size") and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, (tuple, list)):
        return None
    return tuple(value) if all(type(item) is int and item >= 0 for item in value) else None
