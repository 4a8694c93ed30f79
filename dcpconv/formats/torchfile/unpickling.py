"""Read a pickle without trusting it: every name in it is allow-listed, and nothing is imported.

An ordinary unpickler imports and calls whatever the file names.  Here each name becomes a stand-in
of ours (``inert``) or the whole file is refused.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable
from typing import Final, NoReturn

from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.pickling import dumps
from dcpconv.formats.torchfile.stand_ins import (
    HARMLESS,
    Allowed,
    Call,
    Instance,
    Ordered,
    Persistent,
    Ref,
    calls,
    instances,
)

__all__ = [
    "HARMLESS",
    "TRUST_HINT",
    "Allowed",
    "Call",
    "Instance",
    "Ordered",
    "Persistent",
    "Ref",
    "calls",
    "check_size",
    "dumps",
    "instances",
    "loads",
]

TRUST_HINT: Final = (
    "if you trust whoever wrote this file: dcpconv convert SRC DST --engine torch --trust"
)
_DAMAGED_HINT: Final = "the file was cut short or altered; fetch or save it again"


def loads(
    data: bytes | memoryview,
    *,
    allowed: Allowed,
    where: str,
    persistent_load: Callable[[object], object] | None = None,
) -> object:
    """Rebuild a pickled value from plain data and stand-ins.

    Args:
        data: The whole pickle, protocol 2 or later.
        allowed: What each global stands for; any other refuses the file.
        where: File (and record) for error messages.
        persistent_load: Resolves ids of values kept outside; without it there may be none.

    Raises:
        FormatError: A global is not allowed (all such are listed), or the pickle is damaged.
        TypeError: ``allowed`` holds a class that a pickle could alter.
    """
    for name, stand_in in allowed.items():
        if not _is_sealed(stand_in):
            raise TypeError(f"{name}: {stand_in!r} needs a __setstate__, or a pickle can alter it")
    _check_opcodes(memoryview(data).cast("B").tobytes(), where)
    unpickler = _Unpickler(io.BytesIO(data), allowed, persistent_load, where)
    try:
        value = unpickler.load()
    except FormatError as error:
        if not unpickler.refused and error.kind != "untrusted":
            if "file" in dict(error.facts):
                raise
            raise error.with_facts([("file", where), *error.facts]) from error
        named = (str(value) for label, value in error.facts if label == "global")
        unpickler.refused.update(dict.fromkeys(named))
    except Exception as error:  # a hostile pickle can raise anything
        if not unpickler.refused:
            reason = f"{type(error).__name__}: {error}"
            raise FormatError(
                "pickle is damaged", [("file", where), ("reason", reason)], hint=_DAMAGED_HINT
            ) from error
    if unpickler.refused:
        raise FormatError(
            "pickle names code that is not on the allow-list; nothing was imported or run",
            [("file", where), *(("global", name) for name in unpickler.refused)],
            hint=TRUST_HINT,
            kind="untrusted",
        )
    return value


class _Refused:
    """Stands for a global that is not allowed, so that reading goes on and finds all of them."""

    def __init__(self, *_args: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...

    def __setitem__(self, _key: object, _value: object) -> None: ...

    def append(self, _item: object) -> None: ...


class _Sealed:
    """A function that a pickle can call but not alter: BUILD would set attributes on it."""

    __slots__ = ("_call",)
    _call: Callable[..., object]

    def __init__(self, call: Callable[..., object]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: object) -> object:
        return self._call(*args)

    def __setattr__(self, _name: str, _value: object) -> NoReturn:
        raise AttributeError("sealed")


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        allowed: Allowed,
        persistent: Callable[[object], object] | None,
        where: str,
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._allowed = allowed
        self._persistent = persistent
        self._where = where
        self._seen: dict[tuple[str, str], object] = {}
        self.refused: dict[str, None] = {}

    def find_class(self, module: str, name: str, /) -> object:
        stand_in = self._allowed.get((module, name))
        if stand_in is None:
            self.refused[f"{module}.{name}"] = None
            return _Refused
        if stand_in is Ref:
            return Ref(module, name)
        return stand_in if isinstance(stand_in, type) else _Sealed(stand_in)

    def persistent_load(self, pid: object, /) -> object:
        if self._persistent is None:
            raise FormatError("pickle refers to data outside itself", [("file", self._where)])
        return self._persistent(pid)


def _is_sealed(stand_in: Callable[..., object]) -> bool:
    if not isinstance(stand_in, type):
        return True
    is_builtin = stand_in.__module__ in {"builtins", "collections"}
    return is_builtin or hasattr(stand_in, "__setstate__")


# Opcodes by the length of their argument.  Source: CPython Lib/pickletools.py, ``opcodes``.
_NO_ARGUMENT = b"(012NRbaesut)ld}]oQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98"
_FIXED = {1: b"Khq\x80\x82", 2: b"M\x83", 4: b"Jj\x84", 8: b"G\x95"}
_LENGTH_PREFIXED = {
    **dict.fromkeys(b"UC\x8a\x8c", struct.Struct("<B")),
    **dict.fromkeys(b"TBX\x8b", struct.Struct("<I")),
    **dict.fromkeys(b"\x8d\x8e\x96", struct.Struct("<Q")),
}
_GLOBAL, _STOP, _LONG_BINPUT = b"c"[0], b"."[0], b"r"[0]


def _check_opcodes(data: bytes, where: str) -> None:
    """Walk the opcodes so that no length or memo index in them can make the unpickler allocate
    much more than the pickle itself; text opcodes of protocol 0 are declined.

    CPython sizes its memo by the largest index and touches all of it, and allocates a string
    before it looks whether its bytes are there (``Modules/_pickle.c``: ``_Unpickler_MemoPut``,
    ``load_counted_binbytes``).
    """
    top, upper = len(data) >> 24, (len(data) >> 16) & 0xFF
    memo_put = b"r..[\\x00-\\x%02x]\\x%02x" % (upper, top)
    if top:
        memo_put += b"|r...[\\x00-\\x%02x]" % (top - 1)
    fixed = b"|".join(
        b"[%s].{%d}" % (re.escape(opcodes), length) for length, opcodes in _FIXED.items()
    )
    # Bounded repeats: an unbounded one keeps a record of every turn.
    pattern = b"(?:[%s]+|%s|%s){1,200}" % (re.escape(_NO_ARGUMENT), fixed, memo_put)
    run = re.compile(pattern, re.DOTALL).match

    position, end = 0, len(data)
    while position < end:
        simple = run(data, position)
        if simple:
            position = simple.end()
            continue
        opcode = data[position]
        if opcode == _STOP:
            return
        prefix = _LENGTH_PREFIXED.get(opcode)
        if prefix:
            start = position + 1 + prefix.size
            if start > end:
                break
            (nbytes,) = prefix.unpack_from(data, position + 1)
            position = start + nbytes
        elif opcode == _GLOBAL:
            position = data.find(b"\n", data.find(b"\n", position) + 1 or end) + 1 or end
        elif position + 9 > end and opcode in b"r" + b"".join(_FIXED.values()):
            break
        else:
            what = (
                "an absurd memo index"
                if opcode == _LONG_BINPUT
                else f"an opcode we decline, {bytes([opcode])!r}"
            )
            raise FormatError(
                f"pickle holds {what}",
                [("file", where), ("at", f"byte {position} of the pickle")],
                hint=_DAMAGED_HINT,
            )
    raise FormatError(
        "pickle ends in the middle",
        [("file", where), ("expected", "more bytes"), ("found", f"{end} bytes")],
        hint=_DAMAGED_HINT,
    )


_LONGEST_INTEGER: Final = 8 * 255
"""Bits; Python prints no much longer ones, and no writer of ours stores them."""


def check_size(value: object, nbytes: int, where: str) -> None:
    """Refuse a value that is far larger as a tree than the pickle of ``nbytes`` it came from.

    Shared references let a short pickle describe a structure that is endless, exponentially large,
    or too deep for any recursive walk; every later walk relies on this check.
    """
    depth_limit, budget = 100, 8 * nbytes + 10_000
    level: list[object] = [value]
    for _ in range(depth_limit):
        following: list[object] = []
        for node in level:
            if isinstance(node, (list, tuple, set, frozenset)):
                following.extend(node)
            elif isinstance(node, dict):
                following.extend(node.keys())
                following.extend(node.values())
            elif isinstance(node, (Call, Instance)):
                following.extend((*node.args, node.state))
            elif isinstance(node, int) and node.bit_length() > _LONGEST_INTEGER:
                raise FormatError("pickle holds an absurdly large integer", [("file", where)])
            budget -= 1
            if len(following) > budget:
                raise FormatError("pickle expands to far more than its own size", [("file", where)])
        if not following:
            return
        level = following
    raise FormatError(
        "pickle is nested too deeply", [("file", where), ("limit", f"{depth_limit} levels")]
    )
