"""Files that four ranks saved after a step: weights and moments equal what torch gathers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from dcpconv import CheckpointReader, convert
from dcpconv.core.errors import FormatError
from dcpconv.formats.ranks.fsdp_optimizer import read_training
from dcpconv.runs.carrying import convert_run, read_training_state
from support.checkpoints.dcp_directories import read_tensor
from support.checkpoints.rank_files import distributed, save_verl
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp, stock_load
from support.checkpoints.zero_files import Run, write_zero
from support.worlds import rank_file_loads
from support.worlds.dcp_worlds import launch
from support.worlds.rank_file_worlds import SCENES

READABLE = sorted(set(SCENES) - {"fsdp1-local"})


def full(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(directory / "full.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("scene", READABLE)
def test_weights_equal_the_gathered_ones(rank_files: Path, tmp_path: Path, scene: str) -> None:
    directory = rank_files / scene
    convert(directory, tmp_path / "out.pth", form="torch")
    assert_same_bits(stock_load(tmp_path / "out.pth", "torch"), full(directory)["weights"])


@pytest.mark.parametrize("scene", sorted(set(READABLE) - {"fsdp1-flat"}))
def test_moments_have_the_names_of_their_parameters(rank_files: Path, scene: str) -> None:
    directory = rank_files / scene
    catalog = read_training(directory)
    expected = full(directory)["moments"]
    found = {
        name: {kind: read_tensor(catalog, f"optimizer.state.{name}.{kind}") for kind in state}
        for name, state in expected.items()
    }
    for name, state in expected.items():
        assert_same_bits(found[name], state)
    kept = [key for key in catalog.tensors if key.startswith("optimizer.")]
    assert len(kept) == sum(map(len, expected.values()))
    assert catalog.objects["optimizer.param_groups.0.lr"] == 0.1
    assert catalog.objects["optimizer.param_groups.0.params"] == list(expected)


@pytest.mark.parametrize("scene", sorted(set(READABLE) - {"fsdp1-flat"}))
def test_a_run_is_carried_by_name(rank_files: Path, tmp_path: Path, scene: str) -> None:
    report = convert_run(rank_files / scene, tmp_path / "out", to="dcp")

    assert report.source_kind == "fsdp"
    whole = full(rank_files / scene)
    found = flat(nested_of_dcp(tmp_path / "out"))
    expected = {f"model.{key}": value for key, value in whole["weights"].items()}
    for name, state in whole["moments"].items():
        expected |= {f"optim.state.{name}.{kind}": value for kind, value in state.items()}
    assert_same_bits(found, expected)
    groups = read_training_state(tmp_path / "out").groups
    assert [group.params for group in groups] == [tuple(whole["moments"])]
    assert groups[0].values["lr"] == 0.1


@pytest.mark.parametrize("scene", ["fsdp2", "fsdp1-mesh"])
def test_weights_are_those_of_verl_s_merger(rank_files: Path, tmp_path: Path, scene: str) -> None:
    """verl concatenates the local tensors of every key along the dim that is sharded.

    Source: verl 0.7 ``verl/model_merger/fsdp_model_merger.py`` (``_merge_by_placement``).
    """
    names = [rank_files / scene / f"model_world_size_4_rank_{rank}.pt" for rank in range(4)]
    states = [torch.load(name, weights_only=False) for name in names]
    merged: dict[str, torch.Tensor] = {}
    for key, first in states[0].items():
        if isinstance(first, DTensor):
            (placed,) = first.placements
            assert isinstance(placed, Shard)
            merged[key] = torch.cat([state[key].to_local() for state in states], placed.dim)
        else:
            merged[key] = first

    convert(rank_files / scene, tmp_path / "out.pth", form="torch")

    assert_same_bits(stock_load(tmp_path / "out.pth", "torch"), merged)


def test_moments_of_whole_modules_are_refused(rank_files: Path) -> None:
    with pytest.raises(FormatError, match="does not count the parameters") as caught:
        read_training(rank_files / "fsdp1-flat")
    assert "use_orig_params" in str(caught.value.hint)


def test_flat_vectors_without_shapes_are_refused(rank_files: Path) -> None:
    with pytest.raises(FormatError, match="without their shapes") as caught:
        convert(rank_files / "fsdp1-local", rank_files / "out", form="dcp")
    assert "--assets DIR" in str(caught.value.hint)


@pytest.mark.parametrize("scene", ["fsdp2", "fsdp2-tp", "fsdp1-mesh"])
def test_one_file_that_stands_twice_is_seen(rank_files: Path, tmp_path: Path, scene: str) -> None:
    shutil.copytree(rank_files / scene, tmp_path / "in")
    one, two = (tmp_path / "in" / f"model_world_size_4_rank_{rank}.pt" for rank in (0, 1))
    shutil.copy(one, two)
    with pytest.raises(FormatError) as caught:
        convert(tmp_path / "in", tmp_path / "out", form="dcp")
    assert "model_world_size_4_rank_1.pt" in str(caught.value)


def test_files_of_eight_ranks_fill_a_model_on_two(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = {key: t.detach() for key, t in rank_file_loads.model().state_dict().items()}
    save_verl(tmp_path / "actor", distributed(expected, [Shard(0)]), shape=(8,))
    launch(2, tmp_path, script=rank_file_loads.__file__)
    assert_same_bits(torch.load(tmp_path / "loaded.pt", weights_only=True), expected)


def test_zero_3_of_eight_ranks_fills_a_model_on_two(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = {key: t.detach() for key, t in rank_file_loads.model().state_dict().items()}
    write_zero(tmp_path / "actor", Run(groups=[expected], ranks=8, stage=3))
    launch(2, tmp_path, script=rank_file_loads.__file__)
    assert_same_bits(torch.load(tmp_path / "loaded.pt", weights_only=True), expected)


def test_stock_load_reads_rank_files(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    expected = {
        key: torch.randn(tensor.shape)
        for key, tensor in rank_file_loads.model().state_dict().items()
    }
    save_verl(tmp_path / "actor", distributed(expected, [Shard(0)]), shape=(3,))
    state = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    load(state, storage_reader=CheckpointReader(tmp_path / "actor"))
    assert_same_bits(state, expected)
