"""Our pickles against Python's own pickle and torch's restricted unpickler."""

from __future__ import annotations

import argparse
import collections
import io
import math
import pickle
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import _weights_only_unpickler as weights_only

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile import unpickling as pickles
from dcpconv.formats.torchfile.unpickling import (
    HARMLESS,
    Call,
    Instance,
    Persistent,
    Ref,
    dumps,
    loads,
)

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


@pytest.mark.parametrize("name", BY_NAME)
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


def test_a_numpy_array_survives_without_numpy() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    again = pickle.loads(dumps(loads(pickle.dumps(array), allowed=HARMLESS, where="x")))
    np.testing.assert_array_equal(again, array)


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
