"""Headers from careless and from hostile writers: refused as the reference reader refuses them."""

from __future__ import annotations

import gc
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from dcpconv import check
from dcpconv.core.errors import FormatError
from dcpconv.formats.safetensors import header as module
from dcpconv.formats.safetensors.files import read_catalog

ENTRY: dict[str, Any] = {"dtype": "I32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(directory: Path, header: bytes, data: bytes = bytes(16)) -> Path:
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


def entry(**fields: object) -> bytes:
    return json.dumps({"w": ENTRY | fields}).encode()


def raw(shape: str = "[2,2]", offsets: str = "[0,16]", more: str = "") -> bytes:
    return f'{{"w":{{"dtype":"I32","shape":{shape},"data_offsets":{offsets}{more}}}}}'.encode()


REFUSED = {
    "number-in-metadata": b'{"__metadata__":{"step":1},' + entry()[1:],
    "list-as-metadata": b'{"__metadata__":["a"],' + entry()[1:],
    "float-shape": raw("[2.0,2]"),
    "text-shape": raw('["2","2"]'),
    "boolean-shape": raw("[true,4]"),
    "infinite-shape": raw("[Infinity]"),
    "not-a-number": raw("[NaN]"),
    "minus-zero": raw("[-0]", "[0,0]"),
    "negative": raw("[-2,-2]"),
    "null-shape": raw("null"),
    "object-shape": raw("{}"),
    "beyond-2-63": raw("[9223372036854775808,0]", "[0,0]"),
    "product-beyond-2-64": raw("[4294967296,4294967296,0]", "[0,0]"),
    "huge-number": raw(f"[{'9' * 5000}]"),
    "1e999-offsets": raw(offsets="[0,1e999]"),
    "float-offsets": raw(offsets="[0,16.0]"),
    "three-offsets": raw(offsets="[0,16,16]"),
    "text-offsets": raw(offsets='"01"'),
    "1e999-elsewhere": raw(more=',"note":1e999'),
    "deep-elsewhere": raw(more=',"note":' + "[" * 200 + "]" * 200),
    "unknown-dtype": entry(dtype="I33"),
    "list-as-dtype": entry(dtype=["I32"]),
    "mark-of-bytes": b"\xef\xbb\xbf" + entry(),
    "utf-16": entry().decode().encode("utf-16"),
    "leading-space": b" " + entry(),
    "lone-surrogate-key": b'{"\\ud800":' + entry()[5:],
    "lone-surrogate-value": b'{"__metadata__":{"a":"\\udc00"},' + entry()[1:],
    "listed-twice": entry()[:-1] + b"," + entry()[1:],
    "field-twice": raw(more=',"shape":[2,2]'),
    "trailing-garbage": entry() + b"x",
    "not-utf-8": entry().replace(b'"w"', b'"\xff"'),
    "record-is-a-number": b'{"w":3}',
    "a-list": b"[" + entry() + b"]",
}


@pytest.mark.parametrize("header", REFUSED.values(), ids=REFUSED)
def test_what_the_reference_reader_refuses_is_refused(header: bytes, tmp_path: Path) -> None:
    file = write(tmp_path, header)
    # The reference takes the last of two, and blanks in front, which its own specification forbids.
    if header.count(b'"w"') < 2 and not header.startswith(b" "):
        with pytest.raises((SafetensorError, OverflowError)), safe_open(file, "pt") as opened:
            opened.get_tensor("w")
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        read_catalog(file)
    assert not check(file)


ACCEPTED = {
    "plain": entry(),
    "trailing-spaces": entry() + b"   ",
    "no-metadata": b'{"__metadata__":null,' + entry()[1:],
    "a-field-more": entry(note={"a": [1, 2.5]}),
    "surrogate-pair": b'{"\\ud83d\\ude00":' + entry()[5:],
    "empty-one-last": raw()[:-1] + b',"e":{"dtype":"I32","shape":[0,3],"data_offsets":[0,0]}}',
    "scalar": raw("[]", "[0,4]")[:-1] + b',"v":{"dtype":"U8","shape":[12],"data_offsets":[4,16]}}',
}


@pytest.mark.parametrize("header", ACCEPTED.values(), ids=ACCEPTED)
def test_what_it_accepts_is_accepted(header: bytes, tmp_path: Path) -> None:
    file = write(tmp_path, header)
    with safe_open(file, "pt") as opened:
        keys = set(opened.keys())
    assert set(read_catalog(file).tensors) == keys


def test_bytes_that_are_not_accounted_for_are_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million tensors in one place cost a sort, and no objects."""
    header = {f"w{n}": ENTRY for n in range(3000)}
    file = write(tmp_path, json.dumps(header).encode())
    built: list[str] = []
    monkeypatch.setattr(module, "TensorEntry", lambda key, *_: built.append(key))
    with pytest.raises(FormatError, match="tensors overlap"):
        read_catalog(file)
    assert built == []


def test_many_entries_do_not_wake_the_collector(tmp_path: Path) -> None:
    """It looks at everything that is alive, again and again: quadratic in the end."""
    count = 20_000
    header = {
        f"w{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(count)
    }
    file = write(tmp_path, json.dumps(header).encode(), bytes(count))
    runs: list[object] = []
    gc.enable()  # a command that ran in this process has switched it off
    gc.callbacks.append(lambda phase, _info: runs.append(phase))
    try:
        read_catalog(file)
    finally:
        gc.callbacks.pop()
    assert runs.count("start") <= 3  # around the reading; every 2,000 objects start one otherwise
    assert gc.isenabled()


def test_a_gap_in_numbers_is_a_fault_only_where_a_tensor_has_one(tmp_path: Path) -> None:
    """Ranks that had nothing to write leave a gap, as on a mesh of shards and replicas."""
    for number, row in ((1, 0), (3, 2), (6, 4)):
        info = json.dumps({"w": {"saved_offsets": [row, 0]}})
        header = {"__metadata__": {"DCP_SHARDING_INFO": info}, "w": ENTRY}
        text = json.dumps(header).encode()
        file = tmp_path / f"shard-{number:05}-model-00001-of-00001.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    catalog = read_catalog(tmp_path)
    assert catalog.tensors["w"].shape == (6, 2)
    assert [note.split(";")[0] for note in catalog.notes] == ["no shard file has number 2, 4, 5"]

    (tmp_path / "shard-00003-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FormatError) as caught:
        read_catalog(tmp_path)
    assert "shard-00003-*.safetensors is absent" in str(caught.value)
    assert "w: nothing is stored for [2:4, 0:2]" in str(caught.value)


@pytest.mark.parametrize(
    "offsets", ["[Infinity, 0]", "[1e999, 0]", "[-1, 0]", "[0.0, 0]", "[true, 0]", '"00"', "{}"]
)
def test_offsets_of_slices_that_are_no_numbers(offsets: str, tmp_path: Path) -> None:
    info = json.dumps(f'{{"w": {{"saved_offsets": {offsets}}}}}')
    text = f'{{"__metadata__":{{"DCP_SHARDING_INFO":{info}}},'.encode() + entry()[1:]
    with pytest.raises(FormatError, match="DCP_SHARDING_INFO"):
        read_catalog(write(tmp_path, text))
