"""Checkpoints that DeepSpeed wrote on two ranks, against its own scripts and its own losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from dcpconv import convert
from dcpconv.runs.carrying import convert_run

pytest.importorskip("deepspeed", reason="needs .[interop]")

from support.worlds import zero_resumed
from support.worlds.dcp_worlds import launch
from support.worlds.zero_worlds import (
    AFTER,
    SCENES,
    STEPS,
    Model,
    batches,
    groups,
    loss_of,
    write_worlds,
)

RANKS = 2


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("zero")
    write_worlds(directory, ranks=RANKS)
    return directory


def _converted(source: Path, target: Path) -> dict[str, torch.Tensor]:
    convert(source, target)
    found: dict[str, torch.Tensor] = torch.load(target)
    return found


@pytest.mark.parametrize("scene", SCENES)
def test_weights_are_those_of_zero_to_fp32(scene: str, worlds: Path, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    expected = get_fp32_state_dict_from_zero_checkpoint(str(worlds / scene))

    found = _converted(worlds / scene, tmp_path / "out.pth")

    # Stage 1 lists no frozen parameters, and zero_to_fp32 loses them; the model file has them.
    lost = {"layers.1.up.weight", "layers.1.up.bias"} if scene == "zero1-bf16" else set()
    assert found.keys() == expected.keys() | lost
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key


@pytest.mark.parametrize("scene", ["zero1", "zero2", "zero3", "zero3-groups"])
def test_universal_checkpoints_hold_the_same(scene: str, worlds: Path, tmp_path: Path) -> None:
    out = tmp_path / "universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(worlds / scene / f"global_step{STEPS}")]
    command += ["--output_folder", str(out), "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run(command, check=True, capture_output=True)

    found = _converted(out, tmp_path / "universal.pth")
    expected = _converted(worlds / scene, tmp_path / "zero.pth")

    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key
    if SCENES[scene].frozen:
        return
    convert_run(out, tmp_path / "carried", to="dcp")
    assert _losses_after(tmp_path / "carried") == pytest.approx(
        _losses_of_deepspeed(worlds / scene), rel=1e-4
    )


@pytest.mark.parametrize("scene", ["zero1", "zero2-fp32", "zero3-groups"])
def test_a_carried_run_goes_on_with_the_same_losses(
    scene: str, worlds: Path, tmp_path: Path
) -> None:
    report = convert_run(worlds / scene, tmp_path / "carried", to="dcp")

    assert report.source_kind == "deepspeed"
    assert _losses_after(tmp_path / "carried") == pytest.approx(
        _losses_of_deepspeed(worlds / scene), rel=1e-4
    )


@pytest.mark.parametrize("scene", ["zero2-fp32", "zero3-groups"])
def test_a_run_goes_on_under_fsdp2_on_two_ranks(scene: str, worlds: Path, tmp_path: Path) -> None:
    convert_run(worlds / scene, tmp_path / "carried", to="dcp", chunks=RANKS)

    launch(RANKS, tmp_path, script=zero_resumed.__file__)

    for rank in range(RANKS):
        expected = json.loads((worlds / scene / f"losses{rank}.json").read_text())
        found = json.loads((tmp_path / f"losses{rank}.json").read_text())
        assert len(found) == AFTER == 10
        assert found == pytest.approx(expected, rel=1e-5)


def _losses_of_deepspeed(scene: Path) -> list[float]:
    found = [json.loads((scene / f"losses{rank}.json").read_text()) for rank in range(RANKS)]
    return [sum(losses) / RANKS for losses in zip(*found, strict=True)]


def _losses_after(carried: Path) -> list[float]:
    """Plain torch resumes from a DCP and sees in one process what both ranks saw."""
    model = Model()
    optimizer = torch.optim.AdamW(groups(model), lr=0.5)
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    load(state, checkpoint_id=carried)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    seen = zip(*(batches(rank)[STEPS:] for rank in range(RANKS)), strict=True)
    losses = []
    for ids in seen:
        loss = torch.stack([loss_of(model, one) for one in ids]).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert len(losses) == AFTER
    return losses
