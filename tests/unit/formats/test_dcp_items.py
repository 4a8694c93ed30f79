"""Items of other kinds than one torch archive per tensor: whole state dicts, safetensors, zstd."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import CheckpointReader, check, convert
from dcpconv.core.errors import FormatError
from dcpconv.formats.dcp import OpaqueObject, read_catalog, unpacking

WEIGHTS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
}


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def save_whole(path: Path, state: dict[str, Any]) -> Path:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    save(state, checkpoint_id=path, planner=planner)
    return path


def test_a_state_dict_saved_as_one_object_has_its_tensors(tmp_path: Path) -> None:
    state = {
        "model": OrderedDict(WEIGHTS) | {"t": WEIGHTS["a.weight"].T, "tied": WEIGHTS["a.weight"]},
        "optim": [{"state": {0: torch.ones(2)}}, 3],
        "pair": (torch.ones(1), 1),
        "step": 4,
    }
    source = save_whole(tmp_path / "dcp", state)
    catalog = read_catalog(source)
    assert catalog.objects["step"] == 4
    assert catalog.objects["optim.1"] == 3
    assert isinstance(catalog.objects["pair"], OpaqueObject)
    assert catalog.paths["optim.0.state.0"] == ("optim", 0, "state", "0")
    assert catalog.tied == {"model.tied": "model.a.weight"}
    assert check(source)

    convert(source, tmp_path / "model.pth", only="model", form="torch")
    found = torch.load(tmp_path / "model.pth")["model"]
    assert all(same(found[key], value) for key, value in state["model"].items())  # type: ignore[attr-defined]


def test_safetensors_items_are_read(tmp_path: Path) -> None:
    filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    if not hasattr(filesystem, "SerializationFormat"):
        pytest.skip("this torch writes no safetensors items")
    kind = filesystem.SerializationFormat.SAFETENSORS
    writer = FileSystemWriter(tmp_path / "dcp", serialization_format=kind)
    save({"model": dict(WEIGHTS), "step": 3}, storage_writer=writer)
    convert(tmp_path / "dcp", tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth")
    assert all(same(found["model"][key], value) for key, value in WEIGHTS.items())
    assert found["step"] == 3


def _break_blob(path: Path, change: Any) -> list[str]:
    """What is wrong once the header of the blob in a DCP file was changed."""
    file = path / "__0_0.distcp"
    data = file.read_bytes()
    at = data.index(b'{"__metadata__"') - 8
    (length,) = struct.unpack("<Q", data[at : at + 8])
    header = json.loads(data[at + 8 : at + 8 + length])
    change(header)
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(data[:at] + struct.pack("<Q", len(text)) + text + data[at + 8 + length :])
    problems: list[str] = []
    read_catalog(path, problems=problems)
    return problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda header: header.pop("model.c"), "tensors overlap or leave a hole"),
        (lambda header: header["model.c"].update(dtype="F64"), "item holds fp64 [], .metadata"),
        (lambda header: header["model.c"].update(shape=[1e999]), "header cannot be read"),
    ],
)
def test_damaged_safetensors_items_are_told(change: Any, problem: str, tmp_path: Path) -> None:
    filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    if not hasattr(filesystem, "SerializationFormat"):
        pytest.skip("this torch writes no safetensors items")
    kind = filesystem.SerializationFormat.SAFETENSORS
    writer = FileSystemWriter(tmp_path, serialization_format=kind)
    save({"model": dict(WEIGHTS)}, storage_writer=writer)
    assert problem in "\n".join(_break_blob(tmp_path, change))


def _zstd(path: Path) -> Path:
    pytest.importorskip("zstandard", reason="needs .[interop]")
    extension = pytest.importorskip("torch.distributed.checkpoint._extension")
    writer = FileSystemWriter(path, _extensions=[extension.ZStandard()])
    save({"model": dict(WEIGHTS), "step": 3}, storage_writer=writer)
    return path


def test_zstd_items_are_read(tmp_path: Path) -> None:
    source = _zstd(tmp_path / "dcp")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for engine in ("stream", "torch"):
        convert(source, tmp_path / f"{engine}.pth", engine=engine)
        found = torch.load(tmp_path / f"{engine}.pth")
        assert all(same(found["model"][key], value) for key, value in WEIGHTS.items())
        assert found["step"] == 3
    state: dict[str, Any] = {
        "model": {k: torch.zeros_like(v) for k, v in WEIGHTS.items()},
        "step": 0,
    }
    load(state, storage_reader=CheckpointReader(source))
    assert all(same(state["model"][key], value) for key, value in WEIGHTS.items())
    assert state["step"] == 3
    assert read_catalog(source).source == source
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_zstd_items_that_are_damaged_are_named(tmp_path: Path) -> None:
    source = _zstd(tmp_path / "dcp")
    (file,) = source.glob("*.distcp")
    data = file.read_bytes()
    for change in (data[: len(data) // 2], bytes(len(data)), b""):
        file.write_bytes(change)
        problems: list[str] = []
        read_catalog(source, problems=problems)
        assert any(file.name in text for text in problems)
        with pytest.raises(FormatError, match="damaged or incomplete"):
            convert(source, tmp_path / "out.pth")
    file.unlink()
    with pytest.raises(FormatError, match="file is missing"):
        convert(source, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_zstd_item_may_not_expand_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _zstd(tmp_path / "dcp")
    monkeypatch.setattr(unpacking, "_BESIDE", 64)
    with pytest.raises(FormatError, match="expands to more than"):
        read_catalog(source)


def test_without_zstandard_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _zstd(tmp_path / "dcp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(FormatError, match="pip install zstandard"):
        read_catalog(source)


def test_a_buffer_of_bytes_is_carried(tmp_path: Path) -> None:
    buffer = io.BytesIO(b"0123456789")
    buffer.seek(4)
    torch.save({"w": torch.ones(2), "raw": buffer}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "dcp", form="dcp")
    convert(tmp_path / "dcp", tmp_path / "out.pth", form="torch")
    found = torch.load(tmp_path / "out.pth", weights_only=False)["raw"]
    assert (type(found), found.getvalue(), found.tell()) == (io.BytesIO, b"0123456789", 4)
