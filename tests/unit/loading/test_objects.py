"""Values that are no tensors: as torch's own reader gives them, or an error that names a global."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import decimal
import enum
import fractions
import io
import os
import pathlib
import pickle
import random
import types
import uuid
import warnings
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.unpickling import Call, Instance, Ref, dumps, loads
from dcpconv.loading import objects
from dcpconv.loading.storage_reader import CheckpointReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

KINDS: dict[str, Any] = {
    "size": torch.Size([3, 4]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "layout": torch.strided,
    "qscheme": torch.per_tensor_affine,
    "numpy-float": np.float64(1.5),
    "numpy-int": np.int32(3),
    "numpy-bool": np.bool_(True),
    "numpy-date": np.datetime64("2026-11-26"),
    "numpy-dtype": np.dtype("int32"),
    "array": np.arange(6).reshape(2, 3),
    "array-of-strings": np.array(["ab", "c"]),
    "array-of-objects": np.array(["a", None], dtype=object),
    "numpy-rng": np.random.RandomState(3).get_state(),
    "numpy-random-state": np.random.RandomState(3),
    "numpy-generator": np.random.default_rng(4),
    "python-rng": random.Random(5).getstate(),
    "random": random.Random(6),
    "torch-rng": (torch.Generator().manual_seed(7).get_state(),),
    "namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("runs/a")),
    "simple-namespace": types.SimpleNamespace(a=1),
    "ordered-dict": (collections.OrderedDict(b=1, a=2),),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": (collections.Counter("abca"),),
    "defaultdict": (collections.defaultdict(list, {"a": [1]}),),
    "datetime": dt.datetime(2026, 11, 26, tzinfo=dt.timezone.utc),
    "date": dt.date(2026, 11, 26),
    "timedelta": dt.timedelta(seconds=3),
    "decimal": decimal.Decimal("1.50"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "path": pathlib.Path("a/b"),
    "bytes-io": io.BytesIO(b"epoch:4"),
    "string-io": io.StringIO("epoch:4"),
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"abc"),
    "complex": 1 + 2j,
    "set": ({1, 2},),
    "frozenset": frozenset([1]),
    "slice": slice(1, 2, None),
    "range": range(3),
    "none": None,
    "bool": True,
    "large": 10**30,
    "ellipsis": ...,
    "dataclass": ChunkStorageMetadata(torch.Size([0]), torch.Size([2])),
    "bfloat16": (torch.ones(2, dtype=torch.bfloat16),),
    "parameter": (torch.nn.Parameter(torch.ones(2)),),
    "nested": [1, (2, {"a": torch.Size([1])})],
}


class Color(enum.Enum):
    RED = 1


@dataclass
class Settings:
    width: int


class Runs:
    """What a hostile file would hold: here it makes a directory."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def written(directory: pathlib.Path, value: object) -> pathlib.Path:
    save({"w": torch.ones(2), "x": value}, checkpoint_id=directory)
    return directory


def read(reader: Any) -> object:
    state: dict[str, Any] = {"x": None}
    load(state, storage_reader=reader)
    return state["x"]


def complaint(directory: pathlib.Path, **options: Any) -> str:
    with pytest.raises(CheckpointException) as caught:
        read(CheckpointReader(directory, **options))
    (failure,) = caught.value.failures.values()
    assert isinstance(failure[0], FormatError)
    return str(failure[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("kinds")
    for name, value in KINDS.items():
        if name not in {"ordered-dict", "nested"}:
            written(directory / name, value)
        else:
            written(directory / name, (value,))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_comes_as_from_torch_own_reader(saved: pathlib.Path, kind: str) -> None:
    ours = read(CheckpointReader(saved / kind))
    theirs = read(FileSystemReader(saved / kind))
    assert type(ours) is type(theirs)
    holds_tensors = kind in {"torch-rng", "bfloat16", "parameter"}  # pickled with their addresses
    how = repr if holds_tensors else pickle.dumps
    assert how(ours) == how(theirs)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        pytest.param(Color.RED, "Color", id="enum"),
        pytest.param(Settings(3), "Settings", id="dataclass"),
        pytest.param([(Settings,)], "Settings", id="class"),
        pytest.param(os.path.join, "posixpath.join", id="function"),
    ],
)
def test_any_other_global_is_named_and_handed_on_with_trust(
    tmp_path: pathlib.Path, value: object, named: str
) -> None:
    directory = written(tmp_path / "in", (value,))
    text = complaint(directory)
    assert f"{named}\n" in text
    assert "trust=True" in text
    assert "x" in text
    assert read(CheckpointReader(directory, trust=True)) == (value,)


def test_a_class_that_torch_was_told_to_be_safe_is_handed_on(tmp_path: pathlib.Path) -> None:
    directory = written(tmp_path / "in", (Settings(3), Color.RED))
    assert "Color" in complaint(directory)
    with torch.serialization.safe_globals([Settings, Color]):
        assert read(CheckpointReader(directory)) == (Settings(3), Color.RED)


def test_nothing_is_run(tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "ran"
    directory = written(tmp_path / "in", (Runs(mark),))
    assert "mkdir" in complaint(directory)
    assert not mark.exists()
    read(CheckpointReader(directory, trust=True))
    assert mark.exists()


def test_other_keys_are_read_although_one_object_is_refused(tmp_path: pathlib.Path) -> None:
    directory = written(tmp_path / "in", (Settings(3),))
    state = {"w": torch.zeros(2)}
    load(state, storage_reader=CheckpointReader(directory))
    assert state["w"].eq(1).all()


def archive(value: object, **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    stream.seek(0)
    return stream


class Calls:
    """Anything that a pickle can call or build: ``Calls(function, args, state)``."""

    def __init__(self, *recipe: Any) -> None:
        self.recipe = recipe

    def __reduce__(self) -> tuple[Any, ...]:
        return self.recipe


PLAIN = (3, "|", None, None, None, -1, -1)


def of_bytes(buffer: object, dtype: object) -> Call:
    return Call(Ref("numpy._core.numeric", "_frombuffer"), (buffer, dtype, (2,), "C"))


def dtype(*args: object, state: tuple[object, ...] | None = None) -> Call:
    return Call(Ref("numpy", "dtype"), args, state)


HARM: dict[str, Callable[[], object]] = {
    "endless-deque": lambda: Calls(collections.deque, (range(10**15),)),
    "endless-list": lambda: Calls(list, (range(10**15),)),
    "memory": lambda: Calls(bytearray, (10**15,)),
    "pointers": lambda: Calls(np.dtype, ("O8", False, True), (*PLAIN, 0)),
    "pointers-under-another-name": lambda: Calls(np.dtype, ("i8", False, True), (*PLAIN, 63)),
    "elements-that-grow": lambda: Calls(np.dtype, ("S8", False, True), (*PLAIN[:5], 4096, 1, 0)),
    "elements-that-are-never-aligned": lambda: Calls(
        np.dtype, ("V8", False, True), (*PLAIN[:5], 8, 0, 0)
    ),
    "type-of-all-arrays": lambda: Calls(np.dtype, ("i8", False, False), (*PLAIN, 0)),
    "pointers-in-fields": lambda: np.dtype([("a", "O"), ("b", "i4")]),
    "array-of-a-buffer": lambda: Calls(np.ndarray, ((1,), "O", b"12345678")),
    "altered-class": lambda: Calls(
        getattr, (argparse.Namespace, "x", argparse.Namespace), {"__init__": 3}
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_harmless_globals_could_do_is_refused(harm: str) -> None:
    with pytest.raises(FormatError):
        objects._require_harmless(archive((HARM[harm](),)), "it")


OBJECTS = dtype("O8", False, True, state=(*PLAIN, 63))
NUMBERS = dtype("i8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
ARRAY = Call(
    Ref("numpy._core.multiarray", "_reconstruct"),
    (Ref("numpy", "ndarray"), (0,), b"b"),
    (1, (2,), OBJECTS, False, [None, None]),
)

BY_HAND = {
    "view-of-pointers": of_bytes(ARRAY, NUMBERS),
    "view-of-a-view": of_bytes(of_bytes(bytearray(16), NUMBERS), NUMBERS),
    "bytes-as-objects": of_bytes(bytearray(16), OBJECTS),
    "bytes-of-no-type": of_bytes(bytearray(16), "i8"),
    "view-of-an-instance": of_bytes(Instance(Ref("_io", "BytesIO"), (b"", 0, None)), NUMBERS),
    "memory-by-newobj": Instance(Ref("builtins", "bytes"), None, (10**15,)),
    "endless-by-newobj": Instance(
        Ref("builtins", "frozenset"), None, (Call(Ref("builtins", "range"), (10**15,)),)
    ),
    "fields-by-newobj": Instance(Ref("numpy", "dtype"), None, ([("a", "O")], False, True)),
}


@pytest.mark.parametrize("harm", BY_HAND)
def test_what_python_would_not_pickle_is_refused(harm: str) -> None:
    with pytest.raises(FormatError):
        loads(dumps(BY_HAND[harm]), allowed=objects._allowed(), where="it")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("array", "numpy-"))])
def test_arrays_of_any_protocol_are_handed_on(kind: str) -> None:
    for protocol in (2, 3, 4, 5):
        stream = archive({"x": KINDS[kind]}, pickle_protocol=protocol)
        objects._require_harmless(stream, "it")


def test_bytes_that_protocol_2_spells_make_an_array() -> None:
    data = dumps(of_bytes(bytearray(range(16)), NUMBERS))
    loads(data, allowed=objects._allowed(), where="it")
    assert pickle.loads(data).tobytes() == bytes(range(16))


def test_a_class_cannot_be_altered() -> None:
    """BUILD on a class that is only named would set its attributes."""
    data = b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb."
    with pytest.raises(FormatError, match="damaged"):
        loads(data, allowed=objects._allowed(), where="it")


def test_what_torch_load_would_take_for_something_else_is_refused() -> None:
    legacy = archive({"a": 1}, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"not what torch\.save writes"):
        objects._require_harmless(legacy, "it")
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of all of torch.jit, since 2.9
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), stream)
    stream.seek(0)
    with pytest.raises(FormatError, match="TorchScript"):
        objects._require_harmless(stream, "it")


def test_no_name_of_python_2_leads_elsewhere() -> None:
    """Protocol 2 maps modules of Python 2 to others; what is allowed maps to what is allowed."""
    names = objects._allowed()
    for module, name in names:
        assert (IMPORT_MAPPING.get(module, module) == module) or (
            module in {"__builtin__", "UserDict", "UserList", "UserString"}
        ), (module, name)


def test_a_torch_file_gives_its_values_as_they_were_saved(tmp_path: pathlib.Path) -> None:
    values: dict[str, Any] = {
        "path": pathlib.Path("a/b"),
        "size": torch.Size([2]),
        "namespace": argparse.Namespace(a=pathlib.Path("x")),
        "array": np.arange(3),
        "step": 3,
        "name": "run",
    }
    torch.save({"w": torch.ones(2), **values}, tmp_path / "all.pth")
    state: dict[str, Any] = {"w": torch.zeros(2), **dict.fromkeys(values)}
    load(state, storage_reader=CheckpointReader(tmp_path / "all.pth"))
    assert state.pop("w").eq(1).all()
    assert pickle.dumps(state) == pickle.dumps(values)


def test_metadata_says_which_save_and_which_load(tmp_path: pathlib.Path) -> None:
    directory = written(tmp_path / "in", 3)
    ours, theirs = CheckpointReader(directory), FileSystemReader(directory)
    found, expected = ours.read_metadata().storage_meta, theirs.read_metadata().storage_meta
    assert found is not None
    assert expected is not None
    assert found.save_id == expected.save_id is not None
    again = ours.read_metadata().storage_meta
    assert again is not None
    assert again.load_id == found.load_id is not None
    ours.reset()
    after = ours.read_metadata().storage_meta
    assert after is not None
    assert after.load_id != found.load_id
