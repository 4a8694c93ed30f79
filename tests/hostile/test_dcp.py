"""DCP directories that are damaged, incomplete, or made to harm: one error, and nothing runs."""

from __future__ import annotations

import os
import pickle
import random
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv.core.catalog import KeyPath
from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.formats.dcp.directory import explain, is_dcp, read_catalog
from dcpconv.formats.dcp.metadata import read_metadata
from dcpconv.formats.dcp.objects import OpaqueObject
from support.checkpoints.dcp_directories import read_tensor, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files: rows 0 to 3 and 3 to 6 of each of two tensors, and an object."""
    tensors: dict[KeyPath, torch.Tensor] = {
        ("model", "a"): torch.arange(24.0).reshape(6, 4),
        ("model", "b"): torch.arange(6.0),
    }
    write(tmp_path / "dcp", tensors, {("step",): 3}, chunks=2)
    assert len(read_catalog(tmp_path / "dcp").tensors) == 2
    return tmp_path / "dcp"


def edit(checkpoint: Path, change: Callable[[Any], object]) -> None:
    """Let the real torch classes rewrite ``.metadata``."""
    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    # One shape may be one object for many tensors; a change must hit one of them only.
    for described in metadata.state_dict_metadata.values():
        if not isinstance(described, BytesStorageMetadata):
            described.properties = TensorProperties(dtype=described.properties.dtype)
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def problems_of(checkpoint: Path) -> list[str]:
    """What is wrong, which must be the same with and without a list to put it in."""
    with pytest.raises(FormatError) as raised:
        read_catalog(checkpoint)
    problems: list[str] = []
    read_catalog(checkpoint, problems=problems)
    assert [value for label, value in raised.value.facts if label == "problem"] == problems
    return problems


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


# ------------------------------------------------------------------------------- code in a pickle


class Bomb:
    def __init__(self, func: Callable[..., object], *args: object) -> None:
        self.reduced = func, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


PLACES: list[Any] = [
    pytest.param(lambda _metadata, bomb: bomb, id="instead"),
    pytest.param(lambda metadata, bomb: setattr(metadata, "storage_meta", bomb), id="meta"),
    pytest.param(lambda metadata, bomb: setattr(metadata, "extra", bomb), id="unknown-field"),
    pytest.param(lambda metadata, bomb: metadata.planner_data.update(x=bomb), id="planner_data"),
    pytest.param(
        lambda metadata, bomb: metadata.state_dict_metadata.update(x=bomb), id="state_dict"
    ),
]


@pytest.mark.parametrize("put", PLACES)
def test_code_in_metadata_does_not_run(checkpoint: Path, put: Callable[..., object]) -> None:
    witness = checkpoint / "witness"
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    replaced = put(metadata, Bomb(os.system, f"touch {witness}"))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(replaced or metadata))
    with pytest.raises(FormatError, match=r"posix\.system|nt\.system"):
        read_catalog(checkpoint)
    assert not witness.exists()


def test_code_in_an_object_does_not_run_and_hides_no_other_key(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    state = {"w": torch.ones(3), "bad": Bomb(os.system, f"touch {witness}"), "step": 3}
    save(dict(state), checkpoint_id=tmp_path)
    catalog = read_catalog(tmp_path)
    bad = catalog.objects["bad"]
    assert isinstance(bad, OpaqueObject)
    assert "system" in bad.reason
    assert catalog.objects["step"] == 3
    assert read_tensor(catalog, "w").tolist() == [1, 1, 1]
    assert not witness.exists()


def test_an_object_of_a_class_we_do_not_know_is_opaque(tmp_path: Path) -> None:
    save({"x": Fraction(1, 2), "step": 3}, checkpoint_id=tmp_path)
    found = read_catalog(tmp_path).objects
    assert isinstance(found["x"], OpaqueObject)
    assert "fractions.Fraction" in found["x"].reason
    assert found["step"] == 3


# ------------------------------------------------------------------------------ damaged .metadata


@pytest.mark.parametrize("keep", [0, 1, 2, 10, 100, 0.5, 0.9, -1])
def test_truncated_metadata(checkpoint: Path, keep: float) -> None:
    data = (checkpoint / ".metadata").read_bytes()
    cut = int(keep * len(data)) if isinstance(keep, float) else keep
    (checkpoint / ".metadata").write_bytes(data[:cut])
    with pytest.raises(FormatError) as raised:
        read_catalog(checkpoint)
    assert str(checkpoint / ".metadata") in str(raised.value)


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bytes_never_raise_anything_else(checkpoint: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray((checkpoint / ".metadata").read_bytes())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    (checkpoint / ".metadata").write_bytes(data)
    try:
        read_catalog(checkpoint, problems=[])
    except FormatError as error:
        assert str(error)  # noqa: PT017 (an error is one outcome, none is the other)


VALUES: list[Any] = [
    pytest.param(None, id="none"),
    pytest.param([], id="list"),
    pytest.param({"state_dict_metadata": {}}, id="dict"),
    pytest.param(Metadata({}), id="no-storage-data"),
    pytest.param(Metadata([], storage_data={}), id="state-dict-is-a-list"),  # type: ignore[arg-type]
    pytest.param(Metadata({}, storage_data={}, planner_data=[1]), id="planner-data-is-a-list"),
    pytest.param(TensorProperties(), id="another-record"),
]


@pytest.mark.parametrize("value", VALUES)
def test_other_values_than_metadata(value: object) -> None:
    with pytest.raises(FormatError):
        read_metadata(pickle.dumps(value), where="here")


def test_a_list_of_chunks_shared_by_many_keys_is_refused() -> None:
    """500 kB of pickle that would be 400 million chunks."""
    one = Metadata({}, storage_data={})
    chunks = [chunk((0,), (1,))] * 20_000
    one.state_dict_metadata = {
        f"k{i}": TensorStorageMetadata(TensorProperties(), torch.Size([1]), chunks)
        for i in range(20_000)
    }
    with pytest.raises(FormatError, match="expands to far more"):
        read_metadata(pickle.dumps(one), where="here")


# ------------------------------------------------------------------------------------ lost files


def test_removed_rank_file_is_one_line(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").unlink()
    assert problems_of(checkpoint) == ["__1_0.distcp: file is missing (2 items, first of model.a)"]


def test_a_directory_in_place_of_a_file(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").unlink()
    (checkpoint / "__1_0.distcp").mkdir()
    assert problems_of(checkpoint)[0].startswith("__1_0.distcp: file is missing")


def test_short_file_names_both_sizes(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    nbytes = file.stat().st_size
    os.truncate(file, nbytes - 1)
    assert problems_of(checkpoint) == [
        f"__0_0.distcp: {nbytes - 1} bytes, but needs at least {nbytes} (1 item, first of model.b)"
    ]


def test_what_is_left_can_still_be_listed(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").unlink()
    problems: list[str] = []
    catalog = read_catalog(checkpoint, problems=problems)
    assert [len(entry.chunks) for entry in catalog.tensors.values()] == [1, 1]
    assert catalog.objects == {"step": 3}


def test_metadata_removed(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()
    assert not is_dcp(checkpoint)
    assert "interrupted" in (explain(checkpoint) or "")
    with pytest.raises(NotACheckpointError, match="interrupted"):
        read_catalog(checkpoint)


def test_metadata_of_single_ranks(checkpoint: Path) -> None:
    (checkpoint / ".metadata").rename(checkpoint / "__0.metadata")
    assert "each rank alone" in (explain(checkpoint) or "")


def test_other_directories_are_not_explained(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert not is_dcp(tmp_path)
    assert explain(tmp_path) is None
    assert explain(tmp_path / "absent") is None


# ------------------------------------------------------------------------- chunks, items, offsets


def first_item(metadata: Any, key: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def item_of_b(**fields: object) -> Callable[[Any], None]:
    return lambda metadata: first_item(metadata, "model.b").__dict__.update(fields)


def size_of_b(size: object) -> Callable[[Any], None]:
    return lambda metadata: metadata.state_dict_metadata["model.b"].__dict__.update(size=size)


def drop_second_chunk(metadata: Any) -> None:
    del metadata.state_dict_metadata["model.a"].chunks[1]


def shrink_second_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["model.b"].chunks[1] = chunk((4,), (2,))
    for index in list(metadata.storage_data):
        if index.fqn == "model.b" and index.offset == (3,):
            metadata.storage_data[MetadataIndex("model.b", (4,))] = metadata.storage_data[index]


def grow_first_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["model.b"].chunks[0] = chunk((0,), (4,))


def forget_storage(metadata: Any) -> None:
    for index in list(metadata.storage_data):
        if index.fqn == "model.b":
            del metadata.storage_data[index]


def other_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["model.b"].properties.dtype = torch.int32


def unknown_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["model.b"].properties.dtype = torch.quint8


def another_tensors_item(metadata: Any) -> None:
    info, other = first_item(metadata, "model.b"), first_item(metadata, "model.a")
    info.offset, info.length = other.offset, other.length


def an_objects_item(metadata: Any) -> None:
    info, other = first_item(metadata, "model.b"), first_item(metadata, "step")
    info.offset, info.length = other.offset, other.length


def middle_of_an_item(metadata: Any) -> None:
    info = first_item(metadata, "model.b")
    info.offset += 8
    info.length -= 8


def path_of_objects(metadata: Any) -> None:
    metadata.planner_data["model.b"] = ("model", 1.5)


EDITS = [
    pytest.param(
        drop_second_chunk, ["model.a: nothing is stored for [3:6, 0:4] of [6, 4]"], id="gap"
    ),
    pytest.param(
        shrink_second_chunk,
        ["model.b: item holds fp32 [3], .metadata says fp32 [2]", "[3:4] of [6]"],
        id="gap-and-other-item",
    ),
    pytest.param(
        grow_first_chunk,
        ["item holds fp32 [3]", "model.b: [0:4] and [3:6] both hold [3:4] of [6]"],
        id="overlap",
    ),
    pytest.param(size_of_b(torch.Size([5])), ["model.b: [3:6] reaches outside [5]"], id="outside"),
    pytest.param(
        size_of_b(torch.Size([6, 1])), ["model.b: a chunk has 1 sizes and 1 offsets"], id="dims"
    ),
    pytest.param(
        forget_storage, ["model.b: no item is recorded for the chunk at [0], [3]"], id="no-item"
    ),
    pytest.param(item_of_b(offset=-1), ["model.b: an item's offset is -1", "[0]"], id="negative"),
    pytest.param(
        item_of_b(offset=1 << 61), ["__0_0.distcp: ", "1 item, first of model.b"], id="beyond"
    ),
    pytest.param(
        item_of_b(length=10**6000), ["model.b: an item's length is int", "[0]"], id="huge-integer"
    ),
    pytest.param(
        size_of_b(torch.Size([1 << 40, 1 << 40])),
        ["model.b: shape [1099511627776, "],
        id="absurd-shape",
    ),
    pytest.param(size_of_b("six"), ["model.b: size is not a torch.Size"], id="text-for-size"),
    pytest.param(
        item_of_b(relative_path="../dcp/__0_0.distcp"),
        ["file ../dcp/__0_0.distcp is not inside"],
        id="parent",
    ),
    pytest.param(
        item_of_b(relative_path="/etc/passwd"), ["file /etc/passwd is not inside"], id="absolute"
    ),
    pytest.param(item_of_b(relative_path="a\0b"), ["is not inside the checkpoint"], id="nul"),
    pytest.param(other_dtype, ["item holds fp32 [3], .metadata says i32 [3]"], id="dtype"),
    pytest.param(unknown_dtype, ["element type torch.quint8 is not supported"], id="quantized"),
    pytest.param(another_tensors_item, ["item holds fp32 [3, 4]"], id="another-item"),
    pytest.param(an_objects_item, ["model.b: item is not a tensor"], id="object"),
    pytest.param(middle_of_an_item, ["__0_0.distcp, item at byte"], id="inside-an-item"),
    pytest.param(path_of_objects, ["model.b: planner_data is not a path"], id="path"),
]


@pytest.mark.parametrize(("change", "expected"), EDITS)
def test_edited_metadata_is_blamed_by_key(
    checkpoint: Path, change: Callable[[Any], object], expected: list[str]
) -> None:
    edit(checkpoint, change)
    problems = "\n".join(problems_of(checkpoint))
    for part in expected:
        assert part in problems
    assert "model.a" not in problems or change is drop_second_chunk


def test_all_problems_at_once(checkpoint: Path) -> None:
    def change(metadata: Any) -> None:
        drop_second_chunk(metadata)
        forget_storage(metadata)

    edit(checkpoint, change)
    (checkpoint / "__0_0.distcp").unlink()
    assert len(problems_of(checkpoint)) == 3


def test_items_of_another_transform_are_left_to_who_wrote_them(checkpoint: Path) -> None:
    def change(metadata: Any) -> None:
        first_item(metadata, "model.b").transform_descriptors = ["stream.secret/1"]

    edit(checkpoint, change)
    with pytest.raises(FormatError, match="only the code that wrote them"):
        read_catalog(checkpoint)


def test_overwritten_head_is_noticed(checkpoint: Path) -> None:
    """Every item is looked at, not only the first of a kind."""
    catalog = read_catalog(checkpoint)
    second = catalog.tensors["model.a"].chunks[1].extent
    with (checkpoint / second.file).open("r+b") as file:
        file.seek(second.offset - 44)  # the payload's own record header: 30 bytes and a name
        file.write(b"\0" * 4)
    assert problems_of(checkpoint)[0].startswith("model.a: ")


def test_replicas_of_a_chunk_count_once(checkpoint: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["model.a"].chunks *= 3

    edit(checkpoint, change)
    assert len(read_catalog(checkpoint).tensors["model.a"].chunks) == 2


def test_an_item_that_is_not_a_zip(checkpoint: Path) -> None:
    catalog = read_catalog(checkpoint)
    nbytes = catalog.files["__1_0.distcp"]
    (checkpoint / "__1_0.distcp").write_bytes(struct.pack("<Q", 7) * (nbytes // 8 + 1))
    assert all("no zip directory" in problem for problem in problems_of(checkpoint))
