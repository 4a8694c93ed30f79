"""Values that are no tensors, handed to a planner as the stock reader hands them.

``dcp.load`` unpickles an item with ``torch.load(weights_only=False)``, so whatever it names is
imported and called.  Here the pickle is read once without importing anything, and its bytes are
handed on only if every global in it is one that does no harm, whatever it is called with.

Source:
    torch 2.13 ``distributed/checkpoint/default_planner.py`` (``load_bytes``), ``serialization.py``
    (``load``: a zip with ``constants.pkl`` is TorchScript, what is no zip is the legacy form).
"""

from __future__ import annotations

import io
from _compat_pickle import REVERSE_IMPORT_MAPPING, REVERSE_NAME_MAPPING
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch._weights_only_unpickler import _get_allowed_globals

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError
from dcpconv.formats.dcp.directory import contents_of
from dcpconv.formats.dcp.metadata import MetadataContents
from dcpconv.formats.torchfile.arrays import ItemType, item_type
from dcpconv.formats.torchfile.stand_ins import NUMPY, Ref
from dcpconv.formats.torchfile.unpickling import loads
from dcpconv.stores.local import OpenFile
from dcpconv.stores.remote import RemotePath

if TYPE_CHECKING:
    from typing_extensions import Self

_HINT: Final = (
    "if you trust whoever wrote this: trust=True hands objects through as they are, and"
    " torch.serialization.add_safe_globals([CLASS]) allows one class"
)

_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes)


class Objects:
    """The values of a checkpoint that are no tensors, each as ``torch.save`` would write it.

    Args:
        catalog: The checkpoint.
        are_wanted: Whether they are handed out at all.
        trust: Whether objects that name other globals than harmless ones are handed through.
    """

    def __init__(self, catalog: Catalog, *, are_wanted: bool, trust: bool) -> None:
        self._catalog = catalog
        self._trust = trust
        self.keys = tuple(catalog.objects) if are_wanted else ()

    @property
    def save_id(self) -> str | None:
        """What a DCP was called when it was saved."""
        found = self._contents.save_id if self._catalog.form == "dcp" else None
        return found if isinstance(found, str) else None

    def saved(self, key: str) -> io.BytesIO:
        """The archive of one value, for ``planner.load_bytes``.

        A DCP's item is handed on byte for byte.  Of a ``torch.save`` file the whole value is
        loaded, its tensors mapped and not read, and the part is saved by itself.

        Raises:
            FormatError: It names a global that is not on the allow-list, or it cannot be told.
        """
        if self._catalog.form == "dcp":
            item = self._contents.objects[key]
            data = _read(self._catalog.path / item.file, item.offset, item.nbytes)
            if not self._trust:
                _require_harmless(io.BytesIO(data), f"{item.file}, item of {key}")
            return io.BytesIO(data)
        value = self._value(key)
        stream = io.BytesIO()
        torch.save(value, stream)
        stream.seek(0)
        return stream

    @cached_property
    def _contents(self) -> MetadataContents:
        return contents_of(self._catalog)

    def _value(self, key: str) -> object:
        value = self._catalog.objects[key]
        if value is None or type(value) in {bool, int, float}:
            return value
        # What was read without torch may have been a Path or a defaultdict: a str, a dict by now.
        # Of an object in a store torch would read the tensors, too.
        if isinstance(self._catalog.source, RemotePath) or not _is_archive(self._catalog.source):
            _require_plain(value, key, self._catalog.source)
            return value
        value = self._whole
        for part in self._catalog.path_of(key):
            value = value[part]  # type: ignore[index]
        return value

    @cached_property
    def _whole(self) -> object:
        source = self._catalog.source
        if not self._trust:
            with source.open("rb") as file:
                _require_harmless(file, str(source))
        value: object = torch.load(source, map_location="cpu", mmap=True, weights_only=False)
        return value


def _read(path: Path, offset: int, nbytes: int) -> bytes:
    try:
        with OpenFile(path) as file:
            data = file.read(offset, nbytes)
    except OSError as error:
        raise FormatError(
            "source file cannot be read",
            [("file", path), ("reason", error.strerror)],
            hint="it was there when the checkpoint was listed; was it moved?",
        ) from error
    if len(data) < nbytes:
        facts = [("file", path), ("expected", f"{offset + nbytes} bytes")]
        raise FormatError("source file ends while it is being read", facts)
    return data


def _is_archive(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _require_plain(value: object, key: str, source: Path) -> None:
    """Our own stand-ins are no values: whoever asked would get another class."""
    ahead = [value]
    while ahead:
        node = ahead.pop()
        if isinstance(node, dict):
            ahead += [*node.keys(), *node.values()]
        elif isinstance(node, (list, tuple, set, frozenset)):
            ahead += node
        elif type(node) not in _PLAIN:
            raise FormatError(
                "an object cannot be handed on as it was saved",
                [("file", source), ("key", key), ("found", getattr(node, "cls", type(node)))],
                hint="load the file with torch, save it again, and read that",
            )


def _require_harmless(file: io.BufferedReader | io.BytesIO, where: str) -> None:
    """Check what ``torch.load`` would unpickle of an archive; torch's own reader finds it.

    Raises:
        FormatError: It names a global that is not on the allow-list, or is no such archive.
    """
    found = ""
    records: list[str] = []
    if file.read(4) != b"PK\x03\x04":
        found = "no zip archive"
    else:
        file.seek(0)
        try:
            reader = torch._C.PyTorchFileReader(file)  # noqa: SLF001 - the one torch.load uses
            records = reader.get_all_records()
            if "constants.pkl" in records:
                found = "TorchScript, which is code"
            else:
                pickled = reader.get_record("data.pkl")
        except RuntimeError as error:
            found = str(error).splitlines()[0]
    if found:
        raise FormatError(
            "an object is not what torch.save writes by default",
            [("file", where), ("found", found)],
            hint=_HINT,
        )
    try:
        loads(pickled, allowed=_allowed(), where=where, persistent_load=_storage)
    except FormatError as error:
        raise FormatError(error.headline, error.facts, hint=_HINT) from error


# -------------------------------------------------------- what a pickle makes, without making it


class _Made:
    """Stands for an object that was made by an allowed global: takes whatever a pickle adds.

    What it is made of is looked at in ``__new__``, which the opcodes REDUCE and NEWOBJ both call.
    """

    def __new__(cls, *args: object) -> Self:
        if any(isinstance(arg, _Range) for arg in args):
            raise ValueError("a range is unrolled")  # deque(range(10**12)) would not end
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None: ...

    def __setitem__(self, _key: object, _value: object) -> None: ...

    def append(self, _item: object) -> None: ...

    def extend(self, _items: object) -> None: ...

    def add(self, _item: object) -> None: ...


class _Range(_Made): ...


class _Bytes(_Made):
    """What makes bytes of a value; of a number it would take that much memory."""

    def __new__(cls, *args: object) -> Self:
        if args and isinstance(args[0], int):
            raise ValueError("bytes by their number")
        return super().__new__(cls, *args)


class _Dtype(_Made):
    """A NumPy dtype."""

    item: ItemType

    def __new__(cls, *args: object) -> Self:
        made = super().__new__(cls, *args)
        made.item = item_type(args)
        return made

    def __setstate__(self, state: object) -> None:
        self.item.require_own_state(state)


class _Array(_Made):
    """An array that is a view of bytes; of another array it would be a view of its memory."""

    def __new__(cls, buffer: object, dtype: object, *rest: object) -> Self:
        if not isinstance(buffer, (bytes, bytearray, _Bytes)) or not isinstance(dtype, _Dtype):
            raise ValueError("a NumPy array is made of something that is no bytes")  # noqa: TRY004
        if dtype.item.holds_objects:
            raise ValueError("a NumPy array whose bytes are taken for objects")
        return super().__new__(cls, *rest)


def _storage(pid: object) -> _Made:
    if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
        return _Made()
    raise FormatError("pickle refers to something that is not a storage")


def _stand_in(name: str, kind: type[_Made] = _Made) -> Callable[..., object]:
    """A class of its own for every global, so that none can be altered through another."""
    return type(name, (kind,), {"__setstate__": kind.__setstate__})


_NEVER_CALLED: Final = {
    "builtins": "list dict tuple int float str bool Ellipsis NotImplemented",
    "numpy": "ndarray",
}
"""Named as a value: the factory of a ``defaultdict``, the class of an array.  A call is refused:
``list(range(10**12))`` does not end."""

_CALLED: Final = {
    "builtins": "complex set frozenset slice",
    "collections": "OrderedDict defaultdict deque Counter ChainMap UserDict UserList UserString",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID SafeUUID",
    **dict.fromkeys(
        ("pathlib", "pathlib._local"),
        "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    ),
    "enum": "Enum IntEnum Flag IntFlag StrEnum",
    "_io": "BytesIO StringIO",
    "io": "BytesIO StringIO",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "random": "Random",
    **{f"{module}.multiarray": "scalar _reconstruct" for module in NUMPY},
    "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64 PCG64DXSM",
    "numpy.random._philox": "Philox",
    "numpy.random._sfc64": "SFC64",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    "torch": "Generator",
    "torch._C": "Generator",
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata"
    " MetadataIndex StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
}
"""What makes plain values, and whose arguments and state can do no more than be wrong."""


def _allowed() -> dict[tuple[str, str], Callable[..., object]]:
    """Every global that a handed-on pickle may name: ours, torch's, and those that this process
    has told torch to be safe."""
    names: dict[tuple[str, str], Callable[..., object]] = {}
    for name, value in _get_allowed_globals().items():
        module, _, last = name.rpartition(".")
        is_value = not callable(value) or isinstance(value, torch.dtype)
        names[module, last] = Ref if is_value else _stand_in(last)
    for given in torch.serialization.get_safe_globals():
        value, name = given if isinstance(given, tuple) else (given, None)
        module, last = value.__module__, value.__qualname__
        if name is not None:
            module, _, last = name.rpartition(".")
        names[module, last] = _stand_in(last)
    for module, called in _CALLED.items():
        names.update({(module, name): _stand_in(name) for name in called.split()})
    for module, values in _NEVER_CALLED.items():
        names.update({(module, name): Ref for name in values.split()})
    names["builtins", "range"] = _stand_in("range", _Range)
    names["builtins", "bytes"] = _stand_in("bytes", _Bytes)
    names["builtins", "bytearray"] = _stand_in("bytearray", _Bytes)
    names["_codecs", "encode"] = _stand_in("encode", _Bytes)
    names["numpy", "dtype"] = _stand_in("dtype", _Dtype)
    for module in NUMPY:
        names[f"{module}.numeric", "_frombuffer"] = _stand_in("_frombuffer", _Array)
    # Protocol 2 writes Python 2's names: xrange for range.
    for name, kind in list(names.items()):
        module, last = REVERSE_NAME_MAPPING.get(name, name)
        names[REVERSE_IMPORT_MAPPING.get(module, module), last] = kind
    return names
