"""Rank files, whole runs and live models: what changes while it is read is an error there too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import Shard

from dcpconv import CheckpointReader, convert, load_init_weights
from dcpconv.core.errors import DcpconvError, FormatError, SourceChangedError
from dcpconv.engine.execute import execute
from dcpconv.formats.opening import open_checkpoint
from dcpconv.loading import moving
from dcpconv.loading.materialise import materialise
from dcpconv.loading.reading import read_landings
from dcpconv.runs.carrying.carrying import convert_run
from support.checkpoints.families import hf_tensors
from support.checkpoints.rank_files import distributed, save_verl
from support.checkpoints.zero_files import Run, write_zero
from support.models.hf_models import save_hf, tiny

WEIGHTS = {"a.weight": torch.ones(6, 4), "b.weight": torch.ones(3, 2)}


def verl(path: Path) -> Path:
    return save_verl(path, distributed(WEIGHTS, [Shard(0)]))


def zero(path: Path, stage: int) -> Path:
    write_zero(path, Run(groups=[WEIGHTS], ranks=2, stage=stage))
    return path


def universal(path: Path) -> Path:
    for key, value in WEIGHTS.items():
        (path / "zero" / key).mkdir(parents=True)
        torch.save(value, path / "zero" / key / "fp32.pt")
    return path


def items_of_ranks(path: Path) -> Path:
    """torch_checkpointing: a file per item and rank."""
    split = distributed(WEIGHTS, [Shard(0)])
    made = save_verl(path.with_name("verl-of-it"), split)
    path.mkdir()
    for rank in (0, 1):
        (made / f"model_world_size_2_rank_{rank}.pt").rename(path / f"model_{rank}.pt")
    return path


def meta_ranks(path: Path) -> Path:
    path.mkdir()
    for rank in (0, 1):
        state = {"layers.0.attention.wq.weight": torch.ones(2, 4), "norm.weight": torch.ones(4)}
        torch.save(state, path / f"consolidated.0{rank}.pth")
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "verl": verl,
    "zero-2": lambda path: zero(path, 2),
    "zero-3": lambda path: zero(path, 3),
    "universal": universal,
    "torch_checkpointing": items_of_ranks,
    "meta": meta_ranks,
}


def touched(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))


def replaced(file: Path) -> None:
    state = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(file)


def lost(file: Path) -> None:
    file.unlink()


CHANGES = [touched, replaced, lost]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SOURCES)
def test_every_file_of_every_rank_is_watched(
    name: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCES[name](tmp_path / "in")
    catalog = open_checkpoint(source)
    assert set(catalog.files) <= set(catalog.identities)
    file = catalog.path / max(catalog.files)

    def late(*args: Any, **kwargs: Any) -> Any:
        change(file)
        return execute(*args, **kwargs)

    monkeypatch.setattr("dcpconv.conversion.alone.execute", late)
    with pytest.raises(DcpconvError) as caught:
        convert(source, tmp_path / "out", form="dcp")
    assert file.name in str(caught.value)
    assert not (tmp_path / "out").exists()


def trainer(path: Path) -> Path:
    model = tiny("llama")
    save_hf(model, path)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save({"last_epoch": 1}, path / "scheduler.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 7, "epoch": 1.5}))
    return path


def run_in_a_dcp(path: Path) -> Path:
    state = {"state": {key: {"exp_avg": value} for key, value in WEIGHTS.items()}}
    groups = [{"lr": 0.1, "params": [*WEIGHTS]}]
    save({"model": WEIGHTS, "optim": {**state, "param_groups": groups}}, checkpoint_id=path)
    return path


RUNS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "weights": (trainer, "model.safetensors"),
    "optimizer": (trainer, "optimizer.pt"),
    "schedule": (trainer, "scheduler.pt"),
    "trainer state": (trainer, "trainer_state.json"),
    "dcp": (run_in_a_dcp, "__0_0.distcp"),
    "dcp's metadata": (run_in_a_dcp, ".metadata"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_changes_is_not_carried(
    name: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, file = RUNS[name]
    source = make(tmp_path / "in")

    def late(*args: Any, **kwargs: Any) -> Any:
        change(source / file)
        return execute(*args, **kwargs)

    monkeypatch.setattr("dcpconv.runs.carrying.carrying.execute", late)
    with pytest.raises(DcpconvError) as caught:
        convert_run(source, tmp_path / "out", to="dcp")
    assert str(source / file) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_file_that_changes_under_a_load_is_an_error(
    name: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(4, 3)
    file = tmp_path / name
    save_file(model.state_dict(), file) if name.endswith("s") else torch.save(
        model.state_dict(), file
    )

    def late(*args: Any, **kwargs: Any) -> Any:
        change(file)
        return materialise(*args, **kwargs)

    monkeypatch.setattr(moving, "materialise", late)
    with pytest.raises(DcpconvError) as caught:
        load_init_weights(model, file)
    assert str(file) in str(caught.value)
    assert "its weights are undefined now" in str(caught.value)


def test_a_file_that_changes_while_bytes_arrive_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_hf(tiny("llama"), tmp_path / "in")
    file = tmp_path / "in/model.safetensors"
    read = read_landings

    def late(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        touched(file)
        return found

    monkeypatch.setattr(moving, "read_landings", late)
    with pytest.raises(SourceChangedError, match="was written to"):
        load_init_weights(tiny("llama"), tmp_path / "in")
    assert hf_tensors(tmp_path / "in")


@pytest.mark.parametrize("trust", [False, True])
def test_an_object_whose_file_vanishes_is_our_error(tmp_path: Path, *, trust: bool) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    save({"a": torch.ones(3), "size": {1, 2}}, checkpoint_id=tmp_path / "in")

    class Late(CheckpointReader):
        def prepare_local_plan(self, plan: Any) -> Any:
            (tmp_path / "in/__0_0.distcp").unlink()
            return super().prepare_local_plan(plan)

    state: dict[str, Any] = {"size": None}
    with pytest.raises((FormatError, CheckpointException), match="cannot be"):
        load(state, storage_reader=Late(tmp_path / "in", trust=trust))
