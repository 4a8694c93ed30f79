"""DCP directories against the real torch: what it writes we read, what we write it loads."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv.core.catalog import KeyPath
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.outline import OutTensor
from dcpconv.formats.dcp.directory import outline, read_catalog
from dcpconv.formats.torchfile.stand_ins import Call, Ref
from support.checkpoints.dcp_directories import (
    out_tensor,
    raw,
    read_tensor,
    rows,
    sources,
    write,
    write_outline,
)

DTYPES = [pytest.param(name, id=name) for name in BY_NAME if hasattr(torch, name)]


def filled(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every byte of every element counts up, and so do bools."""
    numel = torch.Size(shape).numel()
    if dtype is torch.bool:
        return (torch.arange(numel) % 3 == 0).reshape(shape)
    nbytes = numel * dtype.itemsize
    data = (torch.arange(nbytes) % 113).to(torch.uint8)
    return data.view(dtype).reshape(shape) if nbytes else torch.empty(shape, dtype=dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape, raw(one)) == (other.dtype, other.shape, raw(other))


# -------------------------------------------------------------------------- torch writes, we read

State = Mapping[KeyPath, torch.Tensor]

VALUES: dict[str, torch.Tensor] = {
    "weight": filled((5, 7)),
    "scalar": torch.tensor(3.5),
    "one": torch.tensor([2.0]),
    "empty": torch.empty(0, 3),
    "transposed": filled((5, 7)).t(),
    "channels-last": filled((2, 3, 4, 5)).contiguous(memory_format=torch.channels_last),
    "column": filled((5, 7))[:, 2:4],
    "rows-of-more": filled((9, 4))[2:5],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "parameter": torch.nn.Parameter(filled((3, 5))),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "dcp"
    save(dict(VALUES), checkpoint_id=path)
    return path


@pytest.mark.parametrize("key", VALUES)
def test_every_kind_of_tensor_is_found(saved: Path, key: str) -> None:
    catalog = read_catalog(saved)
    assert same(read_tensor(catalog, key), VALUES[key])


@pytest.mark.parametrize("name", DTYPES)
def test_every_element_type_is_found(tmp_path: Path, name: str) -> None:
    state = {"x": filled((3, 5), getattr(torch, name)), "y": filled((), getattr(torch, name))}
    save(dict(state), checkpoint_id=tmp_path)
    catalog = read_catalog(tmp_path)
    assert {key: entry.dtype.name for key, entry in catalog.tensors.items()} == {
        "x": name,
        "y": name,
    }
    assert all(same(read_tensor(catalog, key), tensor) for key, tensor in state.items())


def test_order_files_and_form(saved: Path) -> None:
    catalog = read_catalog(saved)
    assert list(catalog.tensors) == list(VALUES)
    assert catalog.files == {"__0_0.distcp": (saved / "__0_0.distcp").stat().st_size}
    assert (catalog.form, catalog.path, catalog.source) == ("dcp", saved, saved)
    assert (catalog.tied, catalog.objects, catalog.paths, catalog.notes) == ({}, {}, {}, ())


def test_objects_and_nesting(tmp_path: Path) -> None:
    state: dict[str, object] = {
        "model": {"layers.0.w": filled((2, 3))},
        "optim": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["a", "b"]}]},
        "step": 7,
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
    }
    save(state, checkpoint_id=tmp_path)
    catalog = read_catalog(tmp_path)
    assert catalog.objects == {
        "optim.param_groups.0.lr": 0.1,
        "optim.param_groups.0.betas": (0.9, 0.95),
        "optim.param_groups.0.params": ["a", "b"],
        "step": 7,
        "dtype": Ref("torch", "bfloat16"),
        "size": Call(Ref("torch", "Size"), ((2, 3),)),
    }
    assert catalog.path_of("model.layers.0.w") == ("model", "layers.0.w")
    assert catalog.path_of("optim.param_groups.0.lr") == ("optim", "param_groups", 0, "lr")
    assert catalog.path_of("step") == ("step",)


def test_flat_and_nested_share_a_key_but_not_a_path(tmp_path: Path) -> None:
    save({"model.w": torch.ones(2)}, checkpoint_id=tmp_path / "flat")
    save({"model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "nested")
    flat, nested = read_catalog(tmp_path / "flat"), read_catalog(tmp_path / "nested")
    assert list(flat.tensors) == list(nested.tensors) == ["model.w"]
    assert (flat.path_of("model.w"), nested.path_of("model.w")) == (("model.w",), ("model", "w"))


@pytest.mark.parametrize(("threads", "together"), [(3, True), (1, False)])
def test_many_files_per_rank(tmp_path: Path, threads: int, together: bool) -> None:  # noqa: FBT001
    writer = FileSystemWriter(tmp_path, single_file_per_rank=together, thread_count=threads)
    save(dict(VALUES), storage_writer=writer)
    catalog = read_catalog(tmp_path)
    assert len(catalog.files) > 1
    assert all(same(read_tensor(catalog, key), tensor) for key, tensor in VALUES.items())


def test_what_torch_converts_from_a_file(tmp_path: Path) -> None:
    state = {"model": {f"layers.{i}.w": filled((4, i + 1)) for i in range(5)}}
    torch.save(state, tmp_path / "file.pth")
    torch_save_to_dcp(tmp_path / "file.pth", tmp_path / "dcp")
    catalog = read_catalog(tmp_path / "dcp")
    assert len(catalog.tensors) == 5
    for name, tensor in state["model"].items():
        assert same(read_tensor(catalog, f"model.{name}"), tensor)


def test_items_of_one_kind_are_told_apart_from_look_alikes(tmp_path: Path) -> None:
    """Equal type, shape and item length, but another order of elements."""
    state = {
        "a": filled((6, 6)),
        "b": filled((6, 6)).t(),
        "c": filled((6, 6)) + 1,
        "d": (filled((6, 6)) + 1).t(),
    }
    save(dict(state), checkpoint_id=tmp_path)
    catalog = read_catalog(tmp_path)
    assert all(same(read_tensor(catalog, key), tensor) for key, tensor in state.items())


# -------------------------------------------------------------------------- we write, torch reads


def as_loaded(path: Path, tensors: State) -> dict[str, torch.Tensor]:
    into = {".".join(map(str, key)): torch.zeros_like(tensor) for key, tensor in tensors.items()}
    load(into, checkpoint_id=path)
    return into


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", DTYPES)
def test_stock_load_of_every_element_type(tmp_path: Path, name: str, chunks: int) -> None:
    dtype = getattr(torch, name)
    tensors: State = {
        ("a",): filled((7, 3), dtype),
        ("b",): filled((), dtype),
        ("c",): filled((4,), dtype),
        ("d", "e"): filled((3, 1, 2), dtype),
    }
    write(tmp_path, tensors, chunks=chunks)
    loaded = as_loaded(tmp_path, tensors)
    for path, tensor in tensors.items():
        assert same(loaded[".".join(map(str, path))], tensor)


@pytest.mark.parametrize("limit", [None, 1, 3000, 10**9], ids=str)
def test_files_are_split_at_the_limit_and_load_all_the_same(
    tmp_path: Path, limit: int | None
) -> None:
    tensors: State = {(f"w{i}",): filled((64, i + 1)) for i in range(6)}
    drawn = write(tmp_path, tensors, chunks=2, max_file_size=limit)
    names = {file.name for file in drawn.files}
    assert {name.split("_")[2] for name in names} == {"0", "1"}
    assert len(names) == (12 if limit == 1 else 2) or limit == 3000
    if limit == 3000:
        assert all(file.nbytes <= 3000 or len(file.payloads) == 1 for file in drawn.files)
    loaded = as_loaded(tmp_path, tensors)
    assert all(same(loaded[str(path[0])], tensor) for path, tensor in tensors.items())


def test_torch_rebuilds_the_nesting_and_the_objects(tmp_path: Path) -> None:
    tensors: State = {("model", "layers.0.w"): filled((4, 3)), ("model", "norm"): filled((5,))}
    objects: dict[KeyPath, object] = {
        ("optim", "groups", 0, "lr"): 0.25,
        ("step",): 7,
        ("note",): {"a": [1, None, "x"]},
    }
    write(tmp_path / "dcp", tensors, objects, chunks=2)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "file.pth")
    state = torch.load(tmp_path / "file.pth", weights_only=True)
    assert state["optim"] == {"groups": [{"lr": 0.25}]}
    assert (state["step"], state["note"]) == (7, {"a": [1, None, "x"]})
    assert list(state["model"]) == ["layers.0.w", "norm"]
    assert all(same(state["model"][path[1]], tensor) for path, tensor in tensors.items())


def test_empty_tensor_and_empty_checkpoint(tmp_path: Path) -> None:
    tensors: State = {("e",): torch.empty(0, 3), ("f",): torch.ones(2)}
    write(tmp_path / "tensor", tensors)
    assert as_loaded(tmp_path / "tensor", tensors)["f"].tolist() == [1, 1]
    assert read_catalog(tmp_path / "tensor").tensors["e"].shape == (0, 3)
    write(tmp_path / "nothing", {})
    assert FileSystemReader(tmp_path / "nothing").read_metadata().state_dict_metadata == {}
    assert read_catalog(tmp_path / "nothing").tensors == {}


STATES = [
    pytest.param({"w": filled((4, 3)), "b": filled((), torch.bfloat16)}, id="flat"),
    pytest.param({"model": {"w": filled((4, 3))}, "optim": {"s": filled((4,))}}, id="nested"),
    pytest.param({"w": filled((4, 3)), "groups": [{"lr": 1.0}], "step": 3}, id="objects"),
    pytest.param({f"layers.{i}.w": filled((2, i + 1)) for i in range(300)}, id="many"),
]


@pytest.mark.parametrize("state", STATES)
def test_metadata_equals_what_torch_writes(tmp_path: Path, state: dict[str, object]) -> None:
    save(dict(state), checkpoint_id=tmp_path / "theirs")
    catalog = read_catalog(tmp_path / "theirs")
    write(
        tmp_path / "ours",
        {catalog.path_of(key): read_tensor(catalog, key) for key in catalog.tensors},
        {catalog.path_of(key): value for key, value in catalog.objects.items()},
    )
    theirs, ours = (
        pickle.loads((tmp_path / name / ".metadata").read_bytes()) for name in ("theirs", "ours")
    )
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert list(ours.state_dict_metadata)[:3] == list(theirs.state_dict_metadata)[:3]
    assert ours.planner_data == theirs.planner_data
    assert ours.version == theirs.version
    hints = [{key: key.index for key in md.storage_data} for md in (ours, theirs)]
    assert hints[0] == hints[1]
    assert ours.storage_meta.checkpoint_id is None
    assert vars(ours).keys() == vars(theirs).keys()
    assert vars(ours.storage_meta).keys() == vars(theirs.storage_meta).keys()


def test_every_field_of_every_record_has_torch_s_type(tmp_path: Path) -> None:
    write(tmp_path, {("w",): filled((4, 3))}, chunks=2)
    metadata = FileSystemReader(tmp_path).read_metadata()
    described = metadata.state_dict_metadata["w"]
    assert isinstance(described, TensorStorageMetadata)
    sizes = [described.size, *(chunk.sizes for chunk in described.chunks)]
    assert [type(size) for size in sizes] == [torch.Size] * 3
    assert described.properties.layout is torch.strided
    assert described.properties.memory_format is torch.contiguous_format
    (first, info), _ = metadata.storage_data.items()
    assert type(first.offset) is torch.Size
    assert info.transform_descriptors is None


def test_tied_tensors_take_no_space_and_load_twice(tmp_path: Path) -> None:
    tensor = filled((6, 5))
    boxes = rows(tensor.shape, 2)
    owner, other = (out_tensor((key,), tensor, boxes) for key in ("embed", "head"))
    tied = OutTensor(
        other.key, other.path, other.dtype, other.shape, other.chunks, tied_to=owner.key
    )
    drawn = outline([owner, tied], {})
    assert sum(len(file.payloads) for file in drawn.files) == 2
    write_outline(tmp_path, drawn, sources({("embed",): tensor}, {("embed",): boxes}))
    loaded = as_loaded(tmp_path, {("embed",): tensor, ("head",): tensor})
    assert same(loaded["embed"], tensor)
    assert same(loaded["head"], tensor)
    catalog = read_catalog(tmp_path)
    assert catalog.tied == {"head": "embed"}
    assert catalog.nbytes == tensor.nbytes


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_our_own_directories_are_read_back(tmp_path: Path, chunks: int) -> None:
    tensors: State = {
        ("model", f"{name}-{i}"): filled((5, i + 2), getattr(torch, name))
        for name in BY_NAME
        if hasattr(torch, name)
        for i in range(2)
    }
    write(tmp_path, tensors, {("step",): 3}, chunks=chunks)
    catalog = read_catalog(tmp_path)
    assert list(catalog.tensors) == [".".join(map(str, path)) for path in tensors]
    assert catalog.objects == {"step": 3}
    for path, tensor in tensors.items():
        assert same(read_tensor(catalog, ".".join(map(str, path))), tensor)
        assert catalog.path_of(".".join(map(str, path))) == path
