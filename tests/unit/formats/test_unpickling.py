"""Our pickles against Python's own pickle and torch's restricted unpickler."""

from __future__ import annotations

import argparse
import collections
import io
import math
import pickle
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import _weights_only_unpickler as weights_only

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile import unpickling as pickles
from dcpconv.formats.torchfile.stand_ins import is_array
from dcpconv.formats.torchfile.unpickling import (
    HARMLESS,
    Call,
    Instance,
    Persistent,
    Ref,
    dumps,
    loads,
)
from support.versions import of_torch

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 300), 1 << 300)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=5)
        | st.dictionaries(st.text(max_size=8), inner, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=30,
)


@given(VALUES)
def test_python_and_torch_read_back_what_we_write(value: object) -> None:
    data = dumps(value)
    assert pickle.loads(data) == value
    assert weights_only.load(io.BytesIO(data)) == value
    assert dumps(value) == data


@given(VALUES, st.sampled_from([2, 3, 4, 5]))
def test_we_read_what_python_writes(value: object, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol), allowed=HARMLESS, where="x") == value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({1, 2, 3}, id="set"),
        pytest.param(frozenset({"a"}), id="frozenset"),
        pytest.param(bytearray(b"\x00\xff"), id="bytearray"),
        pytest.param(1 - 2j, id="complex"),
        pytest.param(slice(1, None, 2), id="slice"),
        pytest.param({str(i): str(i % 300) for i in range(700)}, id="many-strings"),
        pytest.param([1 << 8, 1 << 16, 1 << 31, -(1 << 31), -(1 << 31) - 1], id="int-edges"),
    ],
)
def test_other_builtins_survive_both_ways(value: object) -> None:
    assert pickle.loads(dumps(value)) == value
    assert loads(dumps(value), allowed=HARMLESS, where="x") == value
    assert loads(pickle.dumps(value, 2), allowed=HARMLESS, where="x") == value
    assert loads(pickle.dumps(value, 4), allowed=HARMLESS, where="x") == value


def test_nan_and_infinities_keep_their_bits() -> None:
    nan, up, down = pickle.loads(dumps([math.nan, math.inf, -math.inf]))
    assert math.isnan(nan)
    assert (up, down) == (math.inf, -math.inf)


def test_repeated_strings_and_globals_are_written_once() -> None:
    data = dumps([("exp_avg", Ref("torch", "bfloat16"))] * 100)
    assert data.count(b"exp_avg") == data.count(b"bfloat16") == 1


def test_set_order_does_not_show_in_the_bytes() -> None:
    first, second = set([0, 8]), set([8, 0])  # noqa: C405 (8 lands in 0's slot, so order matters)
    assert list(first) != list(second)
    assert dumps(first) == dumps(second)


@pytest.mark.parametrize("name", [of_torch(name) for name in BY_NAME])
def test_dtypes_go_by_name(name: str) -> None:
    dtype = getattr(torch, name)
    assert loads(pickle.dumps(dtype), allowed=HARMLESS, where="x") == Ref("torch", name)
    assert pickle.loads(dumps(Ref("torch", name))) is dtype


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(argparse.Namespace(lr=0.1, betas=(0.9, 0.95)), id="namespace"),
        pytest.param(torch.Size([2, 3]), id="size"),
        pytest.param(torch.device("cuda", 1), id="device"),
        pytest.param(np.float64(2.5), id="numpy-scalar"),
        pytest.param(np.int32(-7), id="numpy-int"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_stand_ins_write_back_the_object_they_were_read_from(value: object, protocol: int) -> None:
    inert = loads(pickle.dumps(value, protocol), allowed=HARMLESS, where="x")
    assert isinstance(inert, (Call, Instance))
    assert pickle.loads(dumps(inert)) == value


ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "rows": np.arange(6, dtype=np.int16).reshape(2, 3),
    "columns": np.arange(6.0).reshape(2, 3).T,
    "other-order": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "strided": np.arange(12)[::2],
    "none": np.zeros((0, 3), dtype=np.float32),
    "scalar": np.array(2.5),
    "strings": np.array(["ab", "c"]),
    "dates": np.array(["2026-11-26"], dtype="M8[D]"),
    "fields": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "objects": np.array([None, "a"], dtype=object),
    "big-endian": np.arange(3, dtype=">i4"),
    "read-only": np.frombuffer(b"abcd", dtype=np.uint8),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_numpy_array_survives_without_numpy(kind: str, protocol: int) -> None:
    array = ARRAYS[kind]
    inert = loads(pickle.dumps(array, protocol), allowed=HARMLESS, where="x")
    assert is_array(inert)
    data = dumps(inert)
    again, expected = pickle.loads(data), pickle.loads(pickle.dumps(array, protocol))
    assert (again.dtype, again.strides) == (expected.dtype, expected.strides)
    np.testing.assert_array_equal(again, array)
    assert loads(data, allowed=HARMLESS, where="x") == inert


def dtype(name: str = "i2", *, flags: int = 0, size: int = -1) -> Call:
    return Call(
        Ref("numpy", "dtype"), (name, False, True), (3, "<", None, None, None, size, -1, flags)
    )


FROM_BUFFER = Ref("numpy._core.numeric", "_frombuffer")


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize(
    "rest", [((3,), "C"), ((1, 3), "F"), ((3, 1), "K", (1, 0)), ((3,), "C", None)]
)
def test_an_array_of_bytes_of_the_pickle_is_written_down(
    module: str, kind: type[bytes | bytearray], rest: tuple[object, ...]
) -> None:
    call = Call(Ref(f"{module}.numeric", "_frombuffer"), (kind(b"abcdef"), dtype(), *rest))
    inert = loads(dumps(call), allowed=HARMLESS, where="x")
    assert inert == call
    assert is_array(inert)


@pytest.mark.parametrize(
    "args",
    [
        pytest.param((bytes(8), dtype("O8", flags=63), (1,), "C"), id="pointers"),
        pytest.param((bytes(8), "O8", (1,), "C"), id="no-type"),
        pytest.param((bytes(8), Call(Ref("torch", "Size"), ((2,),)), (4,), "C"), id="other-type"),
        pytest.param((bytes(6), dtype(), (4,), "C"), id="too-many"),
        pytest.param((bytes(6), dtype(), (2,), "C"), id="too-few"),
        pytest.param((bytes(4), dtype(), (-1, -2), "C"), id="negative"),
        pytest.param((bytes(4), dtype(), 2, "C"), id="no-shape"),
        pytest.param((bytes(4), dtype(), (2, 1), "K", (0, 0)), id="an-axis-twice"),
        pytest.param((bytes(4), dtype(), (2,), "Z"), id="no-order"),
        pytest.param((bytes(4), dtype()), id="no-shape-at-all"),
        pytest.param(
            (Call(FROM_BUFFER, (bytes(4), dtype(), (2,), "C")), dtype(), (2,), "C"), id="a-view"
        ),
    ],
)
def test_an_array_that_numpy_would_not_write_is_refused(args: tuple[object, ...]) -> None:
    with pytest.raises(FormatError, match=r"damaged|NumPy"):
        loads(dumps(Call(FROM_BUFFER, args)), allowed=HARMLESS, where="x")


@pytest.mark.parametrize("name", ["bytes", "bytearray"])
def test_bytes_by_their_number_take_no_memory(name: str) -> None:
    with pytest.raises(FormatError, match="by their number"):
        loads(dumps(Call(Ref("builtins", name), (1 << 40,))), allowed=HARMLESS, where="x")


def test_paths_become_strings() -> None:
    stored = pickle.dumps([Path("/data/run/7"), PureWindowsPath("C:/runs/7")])
    assert loads(stored, allowed=HARMLESS, where="x") == ["/data/run/7", "C:\\runs\\7"]


def test_attributes_of_an_ordered_dict_are_dropped() -> None:
    state_dict = torch.nn.Linear(2, 2).state_dict()
    state_dict.clear()
    value = loads(pickle.dumps(state_dict), allowed=HARMLESS, where="x")
    assert value == {}
    assert not vars(value)


def test_persistent_ids_reach_the_caller_and_come_back() -> None:
    data = dumps({"w": Persistent(("storage", "0"))})
    seen = loads(data, allowed={}, where="x", persistent_load=lambda pid: ["found", pid])
    assert seen == {"w": ["found", ("storage", "0")]}


def test_persistent_ids_are_refused_where_nothing_lies_outside() -> None:
    with pytest.raises(FormatError, match="outside itself"):
        loads(dumps(Persistent("0")), allowed={}, where="x")


def test_every_global_that_is_not_allowed_is_named() -> None:
    data = dumps([Call(Ref("os", "system"), ("true",)), Ref("a", "b"), Ref("torch", "bfloat16")])
    with pytest.raises(FormatError) as caught:
        loads(data, allowed=HARMLESS, where="bad.pth")
    assert [fact for fact in caught.value.facts if fact[0] == "global"] == [
        ("global", "os.system"),
        ("global", "a.b"),
    ]
    assert ("file", "bad.pth") in caught.value.facts
    assert "--trust" in (caught.value.hint or "")


def test_a_class_that_a_pickle_could_alter_may_not_be_allowed() -> None:
    class Open:
        pass

    with pytest.raises(TypeError, match="__setstate__"):
        loads(dumps(None), allowed={("m", "Open"): Open}, where="x")


def test_instances_are_made_by_newobj_and_reduce_alike() -> None:
    table = {("m", "C"): pickles.instances("m", "C")}
    instance = Instance(Ref("m", "C"), {"a": 1}, (2,))
    assert loads(dumps(instance), allowed=table, where="x") == instance
    call = Call(Ref("m", "C"), (2,), {"a": 1})
    assert loads(dumps(call), allowed=table, where="x") == instance


@pytest.mark.parametrize(
    "value", [Ref("m", "C"), Call(Ref("m", "C"), (1,)), Instance(Ref("m", "C"), {"a": 1})], ids=str
)
def test_stand_ins_travel_between_processes(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(object(), id="object"),
        pytest.param(1 << 3000, id="huge-int"),
        pytest.param(torch.zeros(1), id="tensor"),
    ],
)
def test_what_cannot_be_stored_is_refused(value: object) -> None:
    with pytest.raises(FormatError, match="stored"):
        dumps({"a": [value]})


def test_too_deep_a_value_is_refused_in_writing() -> None:
    value: object = 0
    for _ in range(100_000):
        value = [value]
    with pytest.raises(FormatError, match="deep"):
        dumps(value)
