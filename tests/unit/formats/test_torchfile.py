"""Catalogs and outlines of torch.save files; nesting against torch's own flattening."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict

from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.formats.torchfile.files import is_torch_file, outline, read_catalog
from dcpconv.formats.torchfile.nesting import flatten, key_of, nest
from dcpconv.formats.torchfile.unpickling import Instance, Ref
from support.checkpoints.torch_files import assemble, make_tensor, out_tensor, payload_of

TENSOR = torch.ones(2)
LEAVES = st.integers() | st.just(TENSOR) | st.tuples(st.integers()) | st.none()
NESTS = st.dictionaries(
    st.text("ab.", min_size=1, max_size=3),
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.integers(0, 3) | st.text("xy", max_size=2), inner, max_size=3)
        ),
        max_leaves=12,
    ),
    max_size=4,
)


@given(NESTS)
def test_flattening_and_nesting_are_torchs(value: dict[object, object]) -> None:
    leaves = flatten(value, is_tensor=lambda leaf: isinstance(leaf, torch.Tensor))
    try:
        flat, mappings = flatten_state_dict(value)  # type: ignore[arg-type]
    except ValueError:  # torch refuses two paths with one key
        keys = [key_of(path) for path, _ in leaves]
        assert len(set(keys)) < len(keys)
        return
    assert [(path, id(leaf)) for path, leaf in leaves] == [
        (mappings[key], id(leaf)) for key, leaf in flat.items()
    ]
    expected = unflatten_state_dict(flat, mappings)
    assert repr(nest(leaves)) == repr(expected)


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param([("a",), ("a", "b")], id="leaf-and-container"),
        pytest.param([("a", "b"), ("a",)], id="container-and-leaf"),
        pytest.param([("a",), ("a",)], id="twice"),
        pytest.param([("a", 0), ("a", "b")], id="list-and-mapping"),
        pytest.param([("a", 1 << 40)], id="absurd-index"),
        pytest.param([("a", -1)], id="negative-index"),
        pytest.param([(0, "a")], id="number-first"),
        pytest.param([()], id="nowhere"),
    ],
)
def test_paths_that_contradict_each_other_are_refused(paths: list[tuple[str | int, ...]]) -> None:
    with pytest.raises(FormatError):
        nest([(path, None) for path in paths])


def shard_directory(directory: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    directory.mkdir()
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    for name, shard in shards.items():
        torch.save(dict(shard), directory / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


SHARDS = {
    "pytorch_model-00001-of-00002.bin": {"a": make_tensor(torch.bfloat16, (3, 5))},
    "pytorch_model-00002-of-00002.bin": {"b": make_tensor(torch.int8, (7,)), "c": torch.ones(2)},
}


def test_shard_files_are_one_catalog(tmp_path: Path) -> None:
    directory = shard_directory(tmp_path / "m", SHARDS)
    catalog = read_catalog(directory)
    assert catalog.source == catalog.path == directory
    assert list(catalog.tensors) == ["a", "b", "c"]
    assert set(catalog.files) == set(SHARDS)
    for key, entry in catalog.tensors.items():
        extent = entry.chunks[0].extent
        stored = (directory / extent.file).read_bytes()[extent.offset :][: extent.nbytes]
        assert stored == payload_of(SHARDS[extent.file][key])


def test_all_missing_shard_files_are_named(tmp_path: Path) -> None:
    directory = shard_directory(tmp_path / "m", SHARDS)
    for name in SHARDS:
        (directory / name).unlink()
    with pytest.raises(FormatError) as caught:
        read_catalog(directory)
    assert [value for label, value in caught.value.facts if label == "problem"] == [
        f"{name} is named by the index but absent" for name in sorted(SHARDS)
    ]


def test_keys_that_only_the_index_knows_are_named(tmp_path: Path) -> None:
    directory = shard_directory(tmp_path / "m", SHARDS)
    name = "pytorch_model-00002-of-00002.bin"
    torch.save({"c": torch.ones(2)}, directory / name)
    with pytest.raises(FormatError, match=f"puts b into {name}, which does not hold it"):
        read_catalog(directory)


@pytest.mark.parametrize("name", ["../x.bin", "/x.bin", "a/../../x.bin", "", "..", "a\\b", 3])
def test_index_may_not_point_outside(tmp_path: Path, name: object) -> None:
    index = {"weight_map": {"a": name}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="own directory"):
        read_catalog(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, "\x00"])
def test_a_broken_index_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(FormatError):
        read_catalog(tmp_path)


def test_lone_files_are_found_in_their_directory(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "consolidated.pth")
    assert list(read_catalog(tmp_path).files) == ["consolidated.pth"]
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert list(read_catalog(tmp_path).tensors) == ["b"]


def test_a_choice_of_files_is_left_to_the_user(tmp_path: Path) -> None:
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(NotACheckpointError) as caught:
        read_catalog(tmp_path)
    assert ("found", "consolidated.01.pth") in caught.value.facts


def test_an_absent_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError):
        read_catalog(tmp_path / "none.pth")
    assert not is_torch_file(tmp_path / "none.pth")


def test_payload_is_congruent_to_its_source() -> None:
    long, short = make_tensor(torch.float32, (5000,)), make_tensor(torch.float32, (3,))
    tensors = [
        out_tensor(("long",), long, source_offset=1240),
        out_tensor(("short",), short, source_offset=1240),
        out_tensor(("odd",), long, source_offset=1241),
    ]
    (file,) = outline(tensors, {}, filename="x.pth").files
    first, second, third = (offset for offset, _ in file.payloads)
    assert first % 4096 == 1240
    assert second % 64 == 0
    assert third % 64 == 0  # a mapped fp32 tensor at an odd address helps nobody
    longer = out_tensor(("longer",), torch.empty(1 << 14), source_offset=1240)
    (coarse,) = outline([longer], {}, filename="x.pth", modulus=32768).files
    assert coarse.payloads[0][0] % 32768 == 1240


def test_tied_tensors_share_one_payload(tmp_path: Path) -> None:
    weight = make_tensor(torch.float16, (4, 3))
    tensors = [
        out_tensor(("embed",), weight),
        out_tensor(("head",), weight, tied_to="embed"),
        out_tensor(("other",), weight.reshape(3, 4), tied_to="head"),
    ]
    (file,) = outline(tensors, {}, filename="x.pth").files
    assert len(file.payloads) == 1
    path = assemble(file, tmp_path, lambda _fill: payload_of(weight))
    loaded = torch.load(path, weights_only=True)
    assert loaded["head"].data_ptr() == loaded["embed"].data_ptr() == loaded["other"].data_ptr()
    assert read_catalog(path).tied == {"head": "embed"}  # another shape is another view


def test_outline_never_holds_payload_sized_bytes() -> None:
    huge = torch.empty((1 << 20, 1 << 20), dtype=torch.bfloat16, device="meta")
    (file,) = outline([out_tensor(("w",), huge)], {}, filename="x.pth").files
    assert file.nbytes > 2 << 40
    assert sum(len(data) for _, data in file.literals) < 2000


def test_same_input_gives_same_bytes() -> None:
    tensors = [out_tensor(("m", f"w{i}"), torch.ones(i)) for i in range(5)]
    assert outline(tensors, {("step",): 1}, filename="x.pth") == outline(
        tensors, {("step",): 1}, filename="x.pth"
    )


def test_objects_that_cannot_be_stored_are_all_named() -> None:
    with pytest.raises(FormatError) as caught:
        outline([], {("a", "b"): object(), ("c",): [torch.ones(1)]}, filename="x.pth")
    keys = [str(value) for label, value in caught.value.facts if label == "key"]
    assert [key.split(":")[0] for key in keys] == ["a.b", "c"]


def test_stand_ins_are_carried_over(tmp_path: Path) -> None:
    args = Instance(Ref("argparse", "Namespace"), {"lr": 0.1})
    (file,) = outline([], {("args",): args}, filename="x.pth").files
    path = assemble(file, tmp_path, lambda _fill: b"")
    assert torch.load(path, weights_only=False)["args"].lr == 0.1
    assert read_catalog(path).objects == {"args": args}
