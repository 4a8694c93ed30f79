"""What sharded trainings save: our chunks cover every tensor once and hold its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpconv.formats.boxes import inspect_boxes
from dcpconv.formats.dcp.directory import read_catalog
from support.checkpoints.dcp_directories import raw, read_tensor
from support.worlds.dcp_worlds import weights


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    catalog = read_catalog(path)
    assert set(catalog.tensors) == {f"model.{key}" for key in expected}
    for key, tensor in expected.items():
        entry = catalog.tensors[f"model.{key}"]
        assert inspect_boxes(entry.shape, [(c.offsets, c.sizes) for c in entry.chunks]) == ()
        assert catalog.path_of(entry.key) == ("model", key)
        found = read_tensor(catalog, entry.key)
        assert (found.dtype, found.shape, raw(found)) == (tensor.dtype, tensor.shape, raw(tensor))
    assert catalog.objects == {"step": 3}


@pytest.mark.parametrize("scene", ["columns", "replicated"])
def test_two_ranks_placed_by_hand(two: Path, scene: str) -> None:
    check(two / scene, weights(torch.bfloat16))


def test_two_ranks_of_fsdp2(two: Path) -> None:
    check(two / "fsdp", weights())
    catalog = read_catalog(two / "fsdp")
    assert set(catalog.files) == {"__0_0.distcp", "__1_0.distcp"}
    counts = {key: len(entry.chunks) for key, entry in catalog.tensors.items()}
    assert counts == {f"model.{key}": min(2, tensor.shape[0]) for key, tensor in weights().items()}


@pytest.mark.parametrize("scene", ["ours", "ours-chunked"])
def test_two_ranks_of_fsdp2_loaded_what_we_wrote(two: Path, scene: str) -> None:
    check_objects = {"step": 3} if scene == "ours-chunked" else {}
    assert read_catalog(two / scene).objects == check_objects  # the ranks compared the tensors


@pytest.mark.parametrize("scene", ["fsdp", "hsdp"])
def test_four_ranks_of_fsdp2(four: Path, scene: str) -> None:
    check(four / scene, weights())


@pytest.mark.parametrize("scene", ["rows-and-columns", "columns-replicated"])
def test_four_ranks_placed_by_hand(four: Path, scene: str) -> None:
    check(four / scene, weights(torch.bfloat16))


def test_fsdp2_over_tensor_parallelism(four: Path) -> None:
    shapes = {"0.weight": (8, 6), "0.bias": (8,), "1.weight": (6, 8), "1.bias": (6,)}
    expected = {
        key: (torch.arange(torch.Size(shape).numel()).reshape(shape) + number).float()
        for number, (key, shape) in enumerate(shapes.items())
    }
    check(four / "fsdp-over-tp", expected)
    chunks = read_catalog(four / "fsdp-over-tp").tensors["model.1.weight"].chunks
    assert {chunk.sizes for chunk in chunks} == {(3, 4)}
