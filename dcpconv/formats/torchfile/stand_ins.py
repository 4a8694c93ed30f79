"""Inert stand-ins for whatever a pickle names: nothing here imports, calls or is anything else.

A pickle says "call this" and "make an object of that".  ``Call`` and ``Instance`` write it down
instead, and what is written down can be pickled again for whoever does have the real thing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final, NoReturn

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError


@dataclass(frozen=True)
class Ref:
    """A global by name: ``Ref("torch", "bfloat16")`` stands for ``torch.bfloat16``."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def __setstate__(self, state: object) -> NoReturn:
        # Without this a BUILD opcode could change a Ref, and with it what we later write.
        raise FormatError(f"a pickle may not change {self}")

    def __reduce__(self) -> tuple[object, ...]:
        return (Ref, (self.module, self.name))


@dataclass
class Call:
    """A call that is recorded instead of made; ``state`` is what BUILD would add to its result."""

    func: Ref
    args: tuple[object, ...]
    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple[object, ...]:
        return (Call, (self.func, self.args, self.state))


@dataclass
class Instance:
    """An object of a class that is only named: ``cls.__new__(cls, *args)``, then its state."""

    cls: Ref
    state: object
    args: tuple[object, ...] = ()

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple[object, ...]:
        return (Instance, (self.cls, self.state, self.args))


@dataclass
class Persistent:
    """A value kept outside the pickle, by its id: a storage, in ``torch.save`` files."""

    value: object


class Ordered(OrderedDict[object, object]):
    """A ``collections.OrderedDict`` whose attributes (``_metadata``) are dropped on reading."""

    def __setstate__(self, state: object) -> None:
        """Forget ``state``: an attribute named ``items`` would otherwise hide the method."""


Allowed = Mapping[tuple[str, str], Callable[..., object]]
"""What a global may stand for.  A function is called in its place; a class is instantiated and must
define ``__setstate__``; ``Ref`` itself means that the name alone is handed back."""


def calls(module: str, name: str) -> Callable[..., object]:
    """A stand-in for a function or class that is called: records a ``Call``."""

    def record(*args: object) -> Call:
        return Call(Ref(module, name), args)

    return record


def instances(module: str, name: str) -> Callable[..., object]:
    """A stand-in for a class whose objects are rebuilt from state: records an ``Instance``.

    It is a class because the NEWOBJ opcode takes nothing else.
    """

    def new(_cls: type, *args: object) -> Instance:
        return Instance(Ref(module, name), None, args)

    def setstate(_self: object, _state: object) -> None:
        """Exists so that BUILD on the class itself fails instead of changing the class."""

    return type(name, (), {"__new__": new, "__setstate__": setstate})


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in {"latin1", "latin-1"}:
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin-1")


def _defaultdict(*_factory: object) -> dict[object, object]:
    return {}


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _both_spellings(
    name: str, stand_in: Callable[..., object]
) -> Iterator[tuple[tuple[str, str], Callable[..., object]]]:
    # Protocol 2 writes Python 2's module name.  Source: Lib/_compat_pickle.py
    yield ("builtins", name), stand_in
    yield ("__builtin__", name), stand_in


def is_array(value: object) -> bool:
    """Whether a value that was read stands for a NumPy array, whose bytes lie in the pickle."""
    return isinstance(value, Call) and value.func in _ARRAY_MAKERS


NUMPY: Final = ("numpy.core", "numpy._core")
"""Where NumPy 1 and 2 have the functions that a pickle of an array calls."""

_ARRAY_MAKERS: Final = tuple(
    Ref(f"{module}.{name}", maker)
    for module in NUMPY
    for name, maker in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
)
"""``_reconstruct`` makes an empty array, whose bytes come as its state.  Protocol 5, the default
since Python 3.14, calls ``_frombuffer`` on bytes where the array is contiguous."""


def _from_buffer(module: str) -> Callable[..., object]:
    """A stand-in for ``_frombuffer`` on bytes of the pickle and nothing else: of an array of
    objects it would show the pointers."""

    def record(buffer: object, dtype: object, *rest: object) -> Call:
        if not isinstance(buffer, (bytes, bytearray)):
            raise FormatError("a NumPy array is made of something that is no bytes")
        if not (isinstance(dtype, Call) and dtype.func == Ref("numpy", "dtype")):
            raise FormatError("a NumPy array is made of bytes of no type")
        from dcpconv.formats.torchfile.arrays import item_type  # noqa: PLC0415 - few have arrays

        item_type(dtype.args).require_view(len(buffer), *rest)
        return Call(Ref(module, "_frombuffer"), (buffer, dtype, *rest))

    return record


def _bytes(kind: type[bytes | bytearray]) -> Callable[..., object]:
    """A stand-in for ``bytes`` or ``bytearray`` of something; of a number, it takes that much
    memory."""

    def make(*args: Any) -> object:
        if any(isinstance(arg, int) for arg in args):
            raise ValueError(f"{kind.__name__} by their number")
        return kind(*args)

    return make


HARMLESS: Final[dict[tuple[str, str], Callable[..., object]]] = {
    ("collections", "OrderedDict"): Ordered,
    ("collections", "defaultdict"): _defaultdict,
    ("_codecs", "encode"): _encode,
    # Lightning's hyperparameters: a dict whose items are attributes too
    ("lightning.fabric.utilities.data", "AttributeDict"): Ordered,
    ("lightning_fabric.utilities.data", "AttributeDict"): Ordered,
    ("pytorch_lightning.utilities.parsing", "AttributeDict"): Ordered,
    **dict(
        row
        for kind in (set, frozenset, complex, slice)
        for row in _both_spellings(kind.__name__, kind)
    ),
    **dict(
        row for kind in (bytearray, bytes) for row in _both_spellings(kind.__name__, _bytes(kind))
    ),
    # factories of a defaultdict; never called
    **dict(row for name in ("list", "dict", "int", "float") for row in _both_spellings(name, Ref)),
    ("argparse", "Namespace"): instances("argparse", "Namespace"),
    ("_io", "BytesIO"): instances("_io", "BytesIO"),
    ("types", "SimpleNamespace"): calls("types", "SimpleNamespace"),
    **{
        (module, name): path
        for module in ("pathlib", "pathlib._local")
        for name, path in (
            ("Path", _posix_path),
            ("PosixPath", _posix_path),
            ("PurePosixPath", _posix_path),
            ("WindowsPath", _windows_path),
            ("PureWindowsPath", _windows_path),
        )
    },
    ("torch", "Size"): calls("torch", "Size"),
    ("torch", "device"): calls("torch", "device"),
    **{("torch", name): Ref for name in BY_NAME},
    ("numpy", "dtype"): calls("numpy", "dtype"),
    ("numpy", "ndarray"): Ref,
    **{
        (f"{module}.multiarray", name): calls(f"{module}.multiarray", name)
        for module in NUMPY
        for name in ("scalar", "_reconstruct")
    },
    **{(f"{module}.numeric", "_frombuffer"): _from_buffer(f"{module}.numeric") for module in NUMPY},
}
"""Globals that any checkpoint may name; each becomes plain data or an inert stand-in."""
