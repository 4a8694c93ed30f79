"""Run directories that the trainers themselves leave are complete, and every lost file is seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dcpconv import find_checkpoints, find_latest_checkpoint, resolve_checkpoint
from dcpconv.runs import strip, verify_checkpoints
from support.worlds import deepspeed_runs

RANKS = 2


@pytest.fixture(scope="module")
def saved_by_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed", reason="needs .[interop]")
    directory = tmp_path_factory.mktemp("deepspeed")
    deepspeed_runs.launch(directory, RANKS)
    return directory


@pytest.mark.parametrize("stage", deepspeed_runs.STAGES)
def test_deepspeeds_own_run(stage: int, saved_by_deepspeed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved_by_deepspeed / str(stage), run)

    steps = find_checkpoints(run)
    assert [(step.step, step.layout, step.problems) for step in steps] == [
        (1, "deepspeed", ()),
        (2, "deepspeed", ()),
    ]
    assert all(verify_checkpoints(run))

    for file in sorted(steps[1].path.iterdir()):
        data = file.read_bytes()
        for damaged in (None, data[: len(data) // 2]):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            latest = find_latest_checkpoint(run)
            assert latest is not None
            assert latest.path == steps[0].path, file.name
            file.write_bytes(data)
    assert [step.problems for step in find_checkpoints(run)] == [(), ()]


def test_trainers_own_run_is_listed_stripped_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from support.models.hf_models import tiny

    data = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(8, 12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        save_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=tiny("llama", seed=0), args=arguments, train_dataset=data)
    trainer.train()

    steps = find_checkpoints(tmp_path)
    assert [(step.step, step.problems) for step in steps] == [(1, ()), (2, ()), (3, ())]
    assert all(verify_checkpoints(tmp_path))
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    best = resolve_checkpoint("best:loss:min", tmp_path, verify=True)
    assert best is not None
    assert losses[best.step or 0] == min(losses.values())

    before = AutoModelForCausalLM.from_pretrained(steps[0].path).state_dict()
    strip(tmp_path, yes=True)
    assert not (steps[0].path / "optimizer.pt").exists()
    after = AutoModelForCausalLM.from_pretrained(steps[0].path).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)

    latest = resolve_checkpoint("latest", tmp_path, verify=True)
    assert latest is not None
    arguments.max_steps = 4
    again = Trainer(model=tiny("llama", seed=1), args=arguments, train_dataset=data)
    again.train(resume_from_checkpoint=str(latest.path))
    assert again.state.global_step == 4
