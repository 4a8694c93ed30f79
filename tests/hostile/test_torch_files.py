"""Files made to harm: none runs code, none exhausts memory, each gives one FormatError."""

from __future__ import annotations

import builtins
import functools
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.archive import read_tensors
from dcpconv.formats.torchfile.files import is_torch_file, read_catalog
from dcpconv.formats.torchfile.unpickling import (
    HARMLESS,
    Call,
    Instance,
    Persistent,
    Ref,
    check_size,
    dumps,
    loads,
)
from support.checkpoints.torch_files import (
    archive_of,
    make_tensor,
    payload_of,
    saved,
    torch_file,
    zip_of,
)


def read_file(directory: Path, data: bytes) -> Any:
    path = directory / "bad.pth"
    path.write_bytes(data)
    return read_catalog(path)


class Runs:
    """Pickles as a call."""

    def __init__(self, call: object, *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[object, ...]:
        return (self.call, self.args)


CODE = [
    pytest.param(os.system, ("touch {mark}",), "system", id="os.system"),
    pytest.param(eval, ("open('{mark}', 'w')",), "eval", id="eval"),
    pytest.param(exec, ("open('{mark}', 'w')",), "exec", id="exec"),
    pytest.param(getattr, (os, "system"), "getattr", id="getattr"),
    pytest.param(builtins.__import__, ("os",), "__import__", id="import"),
    pytest.param(functools.partial(os.system, "touch {mark}"), (), "partial", id="partial"),
    pytest.param(torch.load, ("{mark}",), "torch.serialization.load", id="torch.load"),
    pytest.param(pickle.loads, (b"N.",), "loads", id="pickle.loads"),
    pytest.param(
        torch.storage._load_from_bytes, (b"",), "torch.storage._load_from_bytes", id="nested-load"
    ),
]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("call", "args", "name"), CODE)
def test_code_is_named_and_not_run(
    tmp_path: Path, call: object, args: tuple[object, ...], name: str, protocol: int
) -> None:
    mark = tmp_path / "mark"
    filled = [arg.format(mark=mark) if isinstance(arg, str) else arg for arg in args]
    try:
        data = pickle.dumps({"w": Runs(call, *filled)}, protocol)
    except (TypeError, pickle.PicklingError):  # a module cannot be pickled: name it by hand
        data = dumps({"w": Call(Ref("builtins", "getattr"), (Ref("os", "path"), "system"))})
    with pytest.raises(FormatError) as caught:
        read_file(tmp_path, torch_file(data))
    assert any(label == "global" and name in str(value) for label, value in caught.value.facts)
    assert "bad.pth" in str(caught.value)
    assert not mark.exists()


def test_allowed_names_do_not_lead_to_others(tmp_path: Path) -> None:
    dotted = b"\x80\x04\x8c\x05torch\x8c\x10Size.__class__.x\x93."
    with pytest.raises(FormatError, match="allow-list"):
        read_file(tmp_path, torch_file(dotted))


NAMESPACE = Ref("argparse", "Namespace")
TENSOR = ("storage", Ref("torch", "FloatStorage"), "0", "cpu", 4)


def v2(*args: object, storage: tuple[object, ...] = TENSOR) -> Call:
    return Call(Ref("torch._utils", "_rebuild_tensor_v2"), (Persistent(storage), *args))


def good_tail() -> tuple[object, ...]:
    return (False, {})


BUILDS = [
    # BUILD with (None, {attribute: value}) sets attributes on whatever lies on the stack
    pytest.param(b"cargparse\nNamespace\n", id="class"),
    pytest.param(b"ctorch\nSize\n", id="function"),
    pytest.param(b"ccollections\nOrderedDict\n", id="builtin-class"),
    pytest.param(b"c__builtin__\nset\n", id="set"),
    pytest.param(b"ctorch\nbfloat16\n", id="dtype"),
    pytest.param(b"ctorch._utils\n_rebuild_tensor_v2\n", id="rebuild"),
]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("attribute", [b"evil", b"name", b"__call__", b"_call", b"__new__"])
def test_a_pickle_cannot_alter_our_stand_ins(tmp_path: Path, name: bytes, attribute: bytes) -> None:
    state = b"N}X%sK\x01s\x86" % (struct.pack("<I", len(attribute)) + attribute)
    with pytest.raises(FormatError):
        read_file(tmp_path, torch_file(b"\x80\x02" + name + state + b"b."))
    assert BY_NAME["bfloat16"].name == "bfloat16"
    namespace = loads(dumps(Instance(NAMESPACE, {"a": 1})), allowed=HARMLESS, where="x")
    assert namespace == Instance(NAMESPACE, {"a": 1})
    assert not hasattr(HARMLESS["argparse", "Namespace"], "evil")


def test_a_checked_tensor_cannot_be_moved_afterwards(tmp_path: Path) -> None:
    call = v2(0, (4,), (1,), *good_tail())
    moved = Call(call.func, call.args, state={"offset": 1 << 40})
    with pytest.raises(FormatError, match="may not change"):
        read_file(tmp_path, torch_file({"w": moved}, {"0": bytes(16)}))


BAD_TENSORS = [
    pytest.param(v2(0, (-4,), (1,), *good_tail()), id="negative-size"),
    pytest.param(v2(0, (4,), (-1,), *good_tail()), id="negative-stride"),
    pytest.param(v2(-1, (1,), (1,), *good_tail()), id="negative-offset"),
    pytest.param(v2(0, (5,), (1,), *good_tail()), id="one-too-many"),
    pytest.param(v2(1, (4,), (1,), *good_tail()), id="offset-past-the-end"),
    pytest.param(v2(5, (0,), (1,), *good_tail()), id="empty-beyond-the-end"),
    pytest.param(v2(0, (2, 2), (3, 1), *good_tail()), id="stride-past-the-end"),
    pytest.param(v2(0, (1 << 62,), (1,), *good_tail()), id="absurd-size"),
    pytest.param(v2(0, (1 << 40, 1 << 40), (0, 0), *good_tail()), id="endless-expansion"),
    pytest.param(v2(0, (1 << 80,), (1 << 80,), *good_tail()), id="beyond-64-bits"),
    pytest.param(v2(0, (2, 2), (1,), *good_tail()), id="ranks-differ"),
    pytest.param(v2(0, (2.0,), (1,), *good_tail()), id="float-size"),
    pytest.param(v2(0, (True,), (1,), *good_tail()), id="bool-size"),
    pytest.param(v2(0, "ab", (1, 1), *good_tail()), id="text-size"),
    pytest.param(v2(0, {"a": 1}, (1,), *good_tail()), id="mapping-size"),
    pytest.param(v2(None, (4,), (1,), *good_tail()), id="no-offset"),
    pytest.param(v2(0, (4,)), id="too-few-arguments"),
    pytest.param(Call(Ref("torch._utils", "_rebuild_tensor_v2"), (None,) * 6), id="no-storage"),
    pytest.param(v2(0, (4,), (1,), *good_tail(), storage=(*TENSOR[:4], 5)), id="storage-too-long"),
    pytest.param(v2(0, (0,), (1,), *good_tail(), storage=(*TENSOR[:4], -1)), id="storage-negative"),
    pytest.param(v2(0, (4,), (1,), *good_tail(), storage=TENSOR[:3]), id="short-id"),
    pytest.param(
        v2(0, (4,), (1,), *good_tail(), storage=("storage", TENSOR[1], "../0", "cpu", 4)),
        id="record-elsewhere",
    ),
    pytest.param(
        v2(0, (4,), (1,), *good_tail(), storage=("storage", TENSOR[1], "7", "cpu", 4)),
        id="record-missing",
    ),
    pytest.param(
        v2(0, (4,), (1,), *good_tail(), storage=("module", TENSOR[1], "0", "cpu", 4)),
        id="not-a-storage",
    ),
    pytest.param(
        Call(Ref("torch._tensor", "_rebuild_from_type_v2"), (1, Ref("torch", "Tensor"), (), {})),
        id="recipe-that-is-no-recipe",
    ),
    pytest.param(
        Call(
            Ref("torch._utils", "_rebuild_tensor_v3"),
            (Persistent(TENSOR), 0, (4,), (1,), False, {}, Ref("torch", "device")),
        ),
        id="dtype-that-is-none",
    ),
]


@pytest.mark.parametrize("tensor", BAD_TENSORS)
def test_tensors_outside_their_storage_are_refused(tmp_path: Path, tensor: Call) -> None:
    good = v2(0, (4,), (1,), *good_tail())
    assert read_file(tmp_path, torch_file({"w": good}, {"0": bytes(16)})).tensors["w"].shape == (4,)
    with pytest.raises(FormatError) as caught:
        read_file(tmp_path, torch_file({"w": tensor}, {"0": bytes(16)}))
    assert caught.value.facts[0] == ("file", str(tmp_path / "bad.pth"))


VALUE = {
    "model": {"embed": make_tensor(torch.bfloat16, (11, 6)), "norm": torch.ones(6)},
    "step": 3,
}


@pytest.mark.parametrize("share", [i / 40 for i in range(40)])
def test_a_file_cut_anywhere_is_one_error(tmp_path: Path, share: float) -> None:
    whole = saved(VALUE)
    with pytest.raises(FormatError) as caught:
        read_file(tmp_path, whole[: int(len(whole) * share)])
    assert "bad.pth" in str(caught.value)


def test_an_interrupted_download_says_how_much_is_missing(tmp_path: Path) -> None:
    whole = saved({"w": torch.zeros(100_000)})
    with pytest.raises(FormatError, match="shorter than its tensors") as caught:
        read_file(tmp_path, whole[:50_000])
    assert ("expected", "more than 400000 bytes") in caught.value.facts
    assert ("found", "50000 bytes") in caught.value.facts
    assert is_torch_file(tmp_path / "bad.pth")


@settings(max_examples=300)
@given(st.data())
def test_any_altered_byte_gives_an_answer_or_one_error(data: st.DataObject) -> None:
    whole = bytearray(saved(VALUE))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        archive = archive_of(bytes(whole))
        _, tensors = read_tensors(archive)
    except FormatError:
        return
    assert all(0 <= t.offset <= t.offset + t.nbytes <= len(whole) for t in tensors)


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_pickle_give_a_value_or_one_error(noise: bytes) -> None:
    try:
        loads(b"\x80\x02" + noise + b".", allowed=HARMLESS, where="noise")
    except FormatError as error:
        assert error.facts[0] == ("file", "noise")  # noqa: PT017 (either outcome is right)


def test_a_compressed_record_is_refused_unread(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"N" * (1 << 24))
    with pytest.raises(FormatError, match="compressed"):
        read_file(tmp_path, buffer.getvalue())


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    data = zip_of({"data.pkl": dumps({}), "data.pkX": dumps({"a": 1})})
    with pytest.raises(FormatError, match="twice"):
        read_file(tmp_path, data.replace(b"data.pkX", b"data.pkl"))


def with_entry(data: bytes, index: int, field: int, value: int) -> bytes:
    """The archive with one 4-byte field of one directory entry replaced."""
    position = -1
    for _ in range(index + 1):
        position = data.index(b"PK\x01\x02", position + 1)
    return data[: position + field] + struct.pack("<I", value) + data[position + field + 4 :]


SIZE, PACKED, HEADER = 24, 20, 42


def test_records_on_top_of_each_other_are_refused(tmp_path: Path) -> None:
    whole = torch_file({"w": v2(0, (4,), (1,), *good_tail())}, {"0": bytes(16), "1": bytes(16)})
    for header in (0, 30):  # data/0 inside data.pkl
        with pytest.raises(FormatError):
            read_file(tmp_path, with_entry(whole, 1, HEADER, header))
    longer = with_entry(with_entry(whole, 1, SIZE, 40), 1, PACKED, 40)
    with pytest.raises(FormatError, match="overlap"):
        read_file(tmp_path, longer)


@pytest.mark.parametrize("size", [1 << 20, 0xFFFFFFFE, 0xFFFFFFFF])
def test_a_record_longer_than_the_file_is_refused(tmp_path: Path, size: int) -> None:
    whole = torch_file({"w": v2(0, (4,), (1,), *good_tail())}, {"0": bytes(16)})
    with pytest.raises(FormatError):
        read_file(tmp_path, with_entry(with_entry(whole, 1, SIZE, size), 1, PACKED, size))


def test_a_header_moved_into_a_payload_is_refused(tmp_path: Path) -> None:
    inner = zip_of({"data/0": bytes(16)})
    whole = torch_file({"w": v2(0, (4,), (1,), *good_tail())}, {"0": bytes(16), "1": inner})
    at = whole.index(inner)
    moved = with_entry(with_entry(whole, 1, HEADER, at), 2, HEADER, 0)
    with pytest.raises(FormatError):
        read_file(tmp_path, moved)


def test_an_endless_directory_is_refused(tmp_path: Path) -> None:
    whole = torch_file({})
    end = whole.rindex(b"PK\x05\x06")
    for fields in ((10, 0xFFFF, "<H"), (12, 0xFFFFFFFF, "<I"), (16, 0xFFFFFFFF, "<I")):
        position, value, form = fields
        bad = bytearray(whole)
        struct.pack_into(form, bad, end + position, value)
        with pytest.raises(FormatError):
            read_file(tmp_path, bytes(bad))


BOMBS = [
    pytest.param(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", id="deep-list"),
    pytest.param(b"\x80\x02)" + b"\x85" * 200_000 + b".", id="deep-tuple"),
    pytest.param(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", id="dict-in-itself"),
    pytest.param(b"\x80\x02]q\x00h\x00a.", id="list-in-itself"),
    pytest.param(
        b"\x80\x02]q\x00K\x01a"
        + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(200))
        + b".",
        id="billion-laughs",
    ),
    pytest.param(b"\x80\x02Nr\xff\xff\xff\xff.", id="memo-4-billion"),
    pytest.param(b"\x80\x02" + b"N" * 100 + b"r\x00\x00\x00\x10" + b"N" * 9 + b".", id="memo-big"),
    pytest.param(b"\x80\x02Np999999999\n.", id="memo-text"),
    pytest.param(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", id="bytes-8-exabytes"),
    pytest.param(b"\x80\x04\x8d\x00\x00\x00\x00\x00\x01\x00\x00x.", id="text-1-tebibyte"),
    pytest.param(b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00x.", id="bytearray-64-gibibytes"),
    pytest.param(b"\x80\x02\x8b\xff\xff\xff\x7f.", id="long-2-gibibytes"),
    pytest.param(b"\x80\x02\x8b\xff\xff\xff\xff.", id="long-negative-length"),
    pytest.param(b"\x80\x04\x95" + b"\xff" * 8 + b"N.", id="frame-endless"),
    pytest.param(b"\x80\x02I" + b"9" * 100_000 + b"\n.", id="decimal-digits"),
    pytest.param(b"\x80\x02\x82\x01.", id="extension-registry"),
    pytest.param(b"\x80\x09N.", id="protocol-9"),
    pytest.param(b"", id="nothing"),
    pytest.param(b".", id="stop"),
    pytest.param(b"\x80\x02e.", id="no-mark"),
    pytest.param(b"\x80\x02h\x07.", id="memo-unset"),
]


@pytest.mark.parametrize("data", BOMBS)
def test_bombs_are_refused_at_once(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        read_file(tmp_path, torch_file(data))
    assert "bad.pth" in str(caught.value)


def test_honest_sharing_is_no_bomb() -> None:
    shared = [1.0] * 50
    value = {f"layer{i}": {"betas": shared, "w": i} for i in range(500)}
    data = pickle.dumps(value, 2)
    read = loads(data, allowed=HARMLESS, where="x")
    check_size(read, len(data), "x")
    assert read == value


@pytest.mark.parametrize("size", [0, 1, 3, 4, 30, 5000])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"PK\x03\x04", b"PK\x05\x06"])
def test_other_files_are_not_torch_files(tmp_path: Path, size: int, fill: bytes) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes((fill * size)[:size])
    assert not is_torch_file(path)
    with pytest.raises(FormatError):
        read_catalog(path)


def test_reading_needs_no_payload(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    whole = saved({"w": tensor})
    holed = whole.replace(payload_of(tensor), b"?" * 16)
    assert read_file(tmp_path, holed).tensors["w"].shape == (4,)
