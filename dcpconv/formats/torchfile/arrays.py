"""Types of NumPy arrays in a pickle, and what such a pickle could ask for that NumPy never writes.

An array shares its type with the pickle, which may change it afterwards: with a larger size the
array would reach beyond its bytes, with other flags they would be taken for pointers.

Source:
    numpy 2.4 ``_core/numeric.py`` (``_frombuffer``), ``_core/src/multiarray/methods.c``
    (``array_reduce_ex_picklebuffer``), ``descriptor.c`` (``arraydescr_reduce``,
    ``arraydescr_setstate``); 1.x has them under ``numpy.core``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_OF_OBJECTS: Final = 0x3F
_OF_POINTERS: Final = 0x07
"""Flags of NumPy's type of Python objects, and those that only it may have: counted references,
pickled as a list, items are pointers.  Source: numpy ``ndarraytypes.h``, ``NPY_ITEM_REFCOUNT``."""

_ALIGNMENT: Final[Mapping[str, int]] = {"S": 1, "V": 1, "U": 4}
"""Bytes, of types of any size, whose state has both; others have -1 for size and alignment."""

_NAME: Final = re.compile(r"[<>|=]?([A-Za-z])([0-9]{1,9})")
_MAKES_A_COPY: Final = (False, True)
"""What follows the name.  Without a copy, a state would alter the type of all arrays there are."""


@dataclass(frozen=True, slots=True)
class ItemType:
    """A NumPy type as ``numpy.dtype("i2", False, True)`` makes it, before its state.

    Attributes:
        letter: Its kind: ``f``, ``i``, ``U``, ...
        itemsize: Bytes of one element.
    """

    letter: str
    itemsize: int

    @property
    def holds_objects(self) -> bool:
        return self.letter == "O"

    def require_own_state(self, state: object) -> None:
        """Refuse the state of another type, or of one with fields.

        Raises:
            ValueError: It is not what NumPy writes for this type.
        """
        if not isinstance(state, tuple) or len(state) not in {8, 9}:
            raise ValueError("the state of a NumPy type has another form")
        if state[2:5] != (None, None, None):
            raise ValueError("a NumPy type of several fields")
        alignment = _ALIGNMENT.get(self.letter)
        if state[5:7] != ((-1, -1) if alignment is None else (self.itemsize, alignment)):
            raise ValueError("a NumPy type with the size of another")
        flags = state[7]
        if not isinstance(flags, int):
            raise ValueError("the flags of a NumPy type are no number")  # noqa: TRY004
        if flags != _OF_OBJECTS if self.holds_objects else flags & _OF_POINTERS:
            raise ValueError("a NumPy type with the flags of another")

    def require_view(self, nbytes: int, shape: object, order: object, axes: object = None) -> None:
        """Refuse what ``_frombuffer`` cannot make of a buffer of ``nbytes``, or must not.

        Raises:
            ValueError: Bytes would be taken for objects, or the array is not of that many bytes.
        """
        if self.holds_objects:
            raise ValueError("a NumPy array whose bytes are taken for objects")
        sizes = _whole_numbers(shape)
        if sizes is None or math.prod(sizes) * self.itemsize != nbytes:
            raise ValueError(f"a NumPy array {shape} of {self.itemsize} bytes each in {nbytes}")
        ordered = axes is None or sorted(_whole_numbers(axes) or ()) == [*range(len(sizes))]
        if order not in {"C", "F", "A", "K"} or not ordered:
            raise ValueError("a NumPy array whose axes have no order")


def item_type(args: tuple[object, ...]) -> ItemType:
    """The type that ``numpy.dtype`` makes of these arguments in a pickle.

    Raises:
        ValueError: NumPy writes no such arguments.
    """
    found = _NAME.fullmatch(args[0]) if args and isinstance(args[0], str) else None
    if found is None or args[1:] != _MAKES_A_COPY:
        raise ValueError("a NumPy type of several fields, or of none")
    letter, number = found[1], int(found[2])
    return ItemType(letter, number * 4 if letter == "U" else number)


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None
