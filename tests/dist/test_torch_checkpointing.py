"""What ``torch_checkpointing`` saved on two ranks: weights and moments as torch gathers them."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import convert
from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.runs.carrying import convert_run
from support.checkpoints.dcp_directories import read_tensor
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp, stock_load
from support.worlds import torch_checkpointing_worlds
from support.worlds.dcp_worlds import launch

pytest.importorskip("torch_checkpointing", reason="needs .[interop]")
KINDS = ("plain", "resharded", "safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torch-checkpointing")
    launch(2, directory, script=torch_checkpointing_worlds.__file__)
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_under_clean_names(saved: Path, tmp_path: Path, kind: str) -> None:
    convert(saved / kind, tmp_path / "out", form="hf")
    expected = torch.load(saved / "full.pt", weights_only=True)["weights"]
    assert_same_bits(stock_load(tmp_path / "out", "hf"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_becomes_one_dcp(saved: Path, tmp_path: Path, kind: str) -> None:
    full = torch.load(saved / "full.pt", weights_only=True)
    convert(saved / kind, tmp_path / "out", form="dcp")
    expected = flat({"model": full["weights"], "optimizer": {"state": full["moments"]}})
    assert_same_bits(stock_load(tmp_path / "out", "dcp"), expected)
    assert open_checkpoint(tmp_path / "out").objects["step"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_carried_by_name(saved: Path, tmp_path: Path, kind: str) -> None:
    full = torch.load(saved / "full.pt", weights_only=True)

    report = convert_run(saved / kind, tmp_path / "out", to="dcp")

    assert report.source_kind == "torch-checkpointing"
    assert report.beside == ("step",)
    expected = flat({"model": full["weights"], "optim": {"state": full["moments"]}})
    assert_same_bits(flat(nested_of_dcp(tmp_path / "out")), expected)


def test_moments_keep_their_places(saved: Path) -> None:
    catalog = open_checkpoint(saved / "resharded")
    moments = torch.load(saved / "full.pt", weights_only=True)["moments"]
    key = "optimizer.state.0.weight.exp_avg"
    assert catalog.path_of(key) == ("optimizer", "state", "0.weight", "exp_avg")
    assert torch.equal(read_tensor(catalog, key), moments["0.weight"]["exp_avg"])
    assert catalog.objects["optimizer.param_groups.0.params"] == list(moments)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("plain", "model_1.pt"),
        ("resharded", "optimizer_1.pt"),
        ("safetensors", "model_1.safetensors"),
    ],
)
def test_lost_files_are_named(saved: Path, tmp_path: Path, kind: str, name: str) -> None:
    shutil.copytree(saved / kind, tmp_path / "in")
    (tmp_path / "in" / name).unlink()
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path / "in")
    assert ("missing", name) in caught.value.facts


def _evil(metadata: dict[str, Any]) -> None:
    layouts = metadata["metadata"]["model"]["rank_to_layout_info"]
    layouts[0]["file_path"] = "../model_0.safetensors"


def _of_more_ranks(metadata: dict[str, Any]) -> None:
    metadata["world_size"] = 3


def _of_another_dim(metadata: dict[str, Any]) -> None:
    groups = metadata["metadata"]["model"]["nested_path_to_metadata"]['["0.weight"]']
    groups[0]["sharding_metadata"]["data"]["placements"] = [{"type": "Shard", "dim": 5}]


def _without_world(metadata: dict[str, Any]) -> None:
    del metadata["world_size"]


@pytest.mark.parametrize("spoil", [_evil, _of_more_ranks, _of_another_dim, _without_world])
def test_metadata_that_does_not_fit_is_refused(saved: Path, tmp_path: Path, spoil: Any) -> None:
    shutil.copytree(saved / "safetensors", tmp_path / "in")
    file = tmp_path / "in" / "metadata.pkl"
    metadata = pickle.loads(file.read_bytes())
    spoil(metadata)
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DcpconvError, match="metadata"):
        open_checkpoint(tmp_path / "in")


def test_metadata_that_names_code_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "resharded", tmp_path / "in")
    (tmp_path / "in" / "metadata.pkl").write_bytes(pickle.dumps({"x": Path}))
    with pytest.raises(FormatError, match="allow-list"):
        open_checkpoint(tmp_path / "in")


def test_the_first_version_is_read_too(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "safetensors", tmp_path / "in")
    file = tmp_path / "in" / "metadata.pkl"
    metadata = pickle.loads(file.read_bytes())
    item = metadata["metadata"]["model"]
    first = {
        "world_size": 2,
        "version": "1.0",
        "metadata": {
            text.replace("[", '["model",', 1): groups
            for text, groups in item["nested_path_to_metadata"].items()
        },
        "rank_to_layout_info_mappings": {
            rank: {"model": info} for rank, info in item["rank_to_layout_info"].items()
        },
    }
    file.write_bytes(pickle.dumps(first))
    convert(tmp_path / "in", tmp_path / "out", form="hf")
    expected = torch.load(saved / "full.pt", weights_only=True)["weights"]
    assert_same_bits(stock_load(tmp_path / "out", "hf"), expected)
