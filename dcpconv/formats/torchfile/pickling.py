"""Write a pickle by hand: plain data and stand-ins, in the opcodes every reader of torch knows."""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.stand_ins import Call, Instance, Ordered, Persistent, Ref


def dumps(value: object) -> bytes:
    r"""Pickle plain data and stand-ins; equal values give equal bytes.

    Protocol 2, and only the opcodes that ``torch.load(weights_only=True)`` knows
    (``torch/_weights_only_unpickler.py``).

    Raises:
        FormatError: A value is of a type that has no place in a checkpoint.

    >>> dumps(Ref("torch", "bfloat16"))
    b'\x80\x02ctorch\nbfloat16\nq\x00.'
    """
    writer = _Writer()
    try:
        writer.write(value)
    except RecursionError as error:
        raise FormatError("value is nested too deeply to be stored") from error
    return b"".join((b"\x80\x02", *writer.out, b"."))


_uint16 = struct.Struct("<H").pack
_int32 = struct.Struct("<i").pack
_uint32 = struct.Struct("<I").pack
_float64 = struct.Struct(">d").pack


class _Writer:
    __slots__ = ("_memo", "out")

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self._memo: dict[str | Ref, bytes] = {}

    def write(self, value: object) -> None:
        method = _BY_TYPE.get(type(value)) or _method_for_subclass(value)
        method(self, value)

    def _remember(self, value: str | Ref) -> None:
        index = len(self._memo)
        if index < 256:
            self.out.append(b"q%c" % index)
            self._memo[value] = b"h%c" % index
        else:
            self.out.append(b"r" + _uint32(index))
            self._memo[value] = b"j" + _uint32(index)

    def write_none(self, _value: object) -> None:
        self.out.append(b"N")

    def write_bool(self, value: object) -> None:
        self.out.append(b"\x88" if value else b"\x89")

    def write_int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out.append(b"K%c" % value)
        elif 0 <= value < 1 << 16:
            self.out.append(b"M" + _uint16(value))
        elif -(1 << 31) <= value < 1 << 31:
            self.out.append(b"J" + _int32(value))
        else:
            encoded = pickle.encode_long(value)
            if len(encoded) > 255:
                raise FormatError("integer is too large to be stored")
            self.out.append(b"\x8a%c" % len(encoded) + encoded)

    def write_float(self, value: float) -> None:
        self.out.append(b"G" + _float64(value))

    def write_str(self, value: str) -> None:
        known = self._memo.get(value)
        if known is not None:
            self.out.append(known)
            return
        encoded = value.encode("utf-8", "surrogatepass")
        self.out.append(b"X" + _uint32(len(encoded)) + encoded)
        self._remember(value)

    def write_bytes(self, value: bytes) -> None:
        # Protocol 2 has no bytes; this is Python's own spelling of them.
        self.write_call(Call(Ref("_codecs", "encode"), (value.decode("latin-1"), "latin1")))

    def write_bytearray(self, value: bytearray) -> None:
        self.write_call(Call(Ref("builtins", "bytearray"), (bytes(value),)))

    def write_complex(self, value: complex) -> None:
        self.write_call(Call(Ref("builtins", "complex"), (value.real, value.imag)))

    def write_slice(self, value: slice[Any, Any, Any]) -> None:
        self.write_call(Call(Ref("builtins", "slice"), (value.start, value.stop, value.step)))

    def write_set(self, value: set[object] | frozenset[object]) -> None:
        name = "frozenset" if isinstance(value, frozenset) else "set"
        # Sorted, because the order of a set of strings changes from process to process.
        self.write_call(Call(Ref("builtins", name), (sorted(value, key=repr),)))

    def write_tuple(self, value: tuple[object, ...]) -> None:
        if len(value) > 3:
            self.out.append(b"(")
        for item in value:
            self.write(item)
        self.out.append((b")", b"\x85", b"\x86", b"\x87")[len(value)] if len(value) < 4 else b"t")

    def write_list(self, value: list[object]) -> None:
        self.out.append(b"]")
        if value:
            self.out.append(b"(")
            for item in value:
                self.write(item)
            self.out.append(b"e")

    def write_dict(self, value: dict[object, object]) -> None:
        self.out.append(b"}")
        self._items(value)

    def write_ordered_dict(self, value: dict[object, object]) -> None:
        self.write_ref(Ref("collections", "OrderedDict"))
        self.out.append(b")R")
        self._items(value)

    def _items(self, value: dict[object, object]) -> None:
        if value:
            self.out.append(b"(")
            for key, item in value.items():
                self.write(key)
                self.write(item)
            self.out.append(b"u")

    def write_ref(self, value: Ref) -> None:
        known = self._memo.get(value)
        if known is not None:
            self.out.append(known)
            return
        self.out.append(f"c{value.module}\n{value.name}\n".encode())
        self._remember(value)

    def write_call(self, value: Call) -> None:
        self.write_ref(value.func)
        self.write_tuple(value.args)
        self.out.append(b"R")
        self._build(value.state)

    def write_instance(self, value: Instance) -> None:
        self.write_ref(value.cls)
        self.write_tuple(value.args)
        self.out.append(b"\x81")
        self._build(value.state)

    def _build(self, state: object) -> None:
        if state is not None:
            self.write(state)
            self.out.append(b"b")

    def write_persistent(self, value: Persistent) -> None:
        self.write(value.value)
        self.out.append(b"Q")


_BY_TYPE: Final[dict[type, Callable[[_Writer, Any], None]]] = {
    type(None): _Writer.write_none,
    bool: _Writer.write_bool,
    int: _Writer.write_int,
    float: _Writer.write_float,
    str: _Writer.write_str,
    bytes: _Writer.write_bytes,
    bytearray: _Writer.write_bytearray,
    complex: _Writer.write_complex,
    slice: _Writer.write_slice,
    set: _Writer.write_set,
    frozenset: _Writer.write_set,
    tuple: _Writer.write_tuple,
    list: _Writer.write_list,
    dict: _Writer.write_dict,
    OrderedDict: _Writer.write_ordered_dict,
    Ordered: _Writer.write_ordered_dict,
    Ref: _Writer.write_ref,
    Call: _Writer.write_call,
    Instance: _Writer.write_instance,
    Persistent: _Writer.write_persistent,
}


def _method_for_subclass(value: object) -> Callable[[_Writer, Any], None]:
    for kind in (bool, int, float, str, bytes, tuple, list, OrderedDict, dict):
        if isinstance(value, kind):
            return _BY_TYPE[kind]
    raise FormatError(
        "value cannot be stored in a checkpoint",
        [("type", f"{type(value).__module__}.{type(value).__qualname__}")],
    )
