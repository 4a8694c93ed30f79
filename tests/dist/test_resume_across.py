"""A run goes on as if nothing had happened, whoever resumes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.nn import functional

from dcpconv import find_checkpoints
from dcpconv.runs.carrying import convert_run
from lingua_model import LinguaModel
from support.checkpoints.stock import nested_of_dcp
from support.models.minimind import GenerationName
from support.runs.training import SEQ, MiniMindRun, batch, launch

MODELS: list[tuple[GenerationName, str]] = [("gen2", "layers"), ("gen4", "model.layers")]


@pytest.mark.parametrize(("generation", "layers"), MODELS, ids=[row[0] for row in MODELS])
def test_a_minimind_run_goes_on_alike_in_itself_and_on_two_ranks(
    generation: GenerationName, layers: str, tmp_path: Path
) -> None:
    begun = MiniMindRun.begin(generation)
    begun.train(5)
    begun.save(tmp_path / "pretrain_96_resume.pth")

    itself = MiniMindRun.begin(generation)
    itself.load(tmp_path / "pretrain_96_resume.pth")
    expected = itself.train(10)

    convert_run(tmp_path / "pretrain_96_resume.pth", tmp_path / "step-5", to="dcp", chunks=2)
    job = {
        "generation": generation,
        "layers": layers,
        "source": str(tmp_path / "step-5"),
        "target": str(tmp_path / "step-15"),
        "steps": 10,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    answer = launch(tmp_path, ranks=2)

    assert (answer["epoch"], answer["world_size"]) == (0, 1)
    torch.testing.assert_close(answer["losses"], expected, rtol=2e-6, atol=2e-6)
    forgetful = MiniMindRun.begin(generation)
    forgetful.model.load_state_dict(begun.model.state_dict())
    forgetful.step = begun.step
    assert abs(forgetful.train(10)[-1] - expected[-1]) > 0.01  # without optimizer and schedule

    steps = find_checkpoints(tmp_path)[1:]  # the resume file is at step 5 of its epoch too
    assert [(step.path.name, step.problems) for step in steps] == [("step-5", ()), ("step-15", ())]
    assert all("optimizer" in step.holds for step in steps)

    convert_run(tmp_path / "step-15", tmp_path / "back_resume.pth", to="minimind")
    back = MiniMindRun.begin(generation)
    back.load(tmp_path / "back_resume.pth")
    assert back.step == 15
    _assert_holds_what_the_ranks_saved(back, tmp_path / "step-15")
    torch.testing.assert_close(back.train(3), itself.train(3), rtol=1e-5, atol=1e-5)


def _assert_holds_what_the_ranks_saved(run: MiniMindRun, step: Path) -> None:
    saved = nested_of_dcp(step)
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, saved["model"][key])  # type: ignore[index]
    moments = saved["optim"]["state"]  # type: ignore[index]
    parameters = dict(run.model.named_parameters())
    assert moments.keys() == parameters.keys()
    for name, parameter in parameters.items():
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(run.optimizer.state[parameter][kind], moments[name][kind])


def test_a_relabelled_run_goes_on_alike_in_another_model(tmp_path: Path) -> None:
    begun = MiniMindRun.begin("gen3")
    begun.train(5)
    begun.save(tmp_path / "a_resume.pth")
    itself = MiniMindRun.begin("gen3")
    itself.load(tmp_path / "a_resume.pth")
    sizes = {"n_heads": "6", "n_kv_heads": "2"}
    convert_run(tmp_path / "a_resume.pth", tmp_path / "0", to="lingua", sizes=sizes)

    params = json.loads((tmp_path / "0" / "params.json").read_text())
    other = MiniMindRun.begin("gen3")
    model = LinguaModel.from_params(params, max_seqlen=SEQ)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optim": moments, "step": 0}
    load(state, checkpoint_id=tmp_path / "0")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    other.load(tmp_path / "a_resume.pth")
    losses = []
    for step in range(state["step"] + 1, state["step"] + 11):
        tokens = batch(step, model.params.vocab_size)
        loss = functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        torch.autograd.backward(loss)
        optimizer.param_groups[0]["lr"] = other.scheduler.get_last_lr()[0]
        optimizer.step()
        other.train(1)  # for its schedule alone
        optimizer.zero_grad()
        losses.append(loss.item())

    torch.testing.assert_close(losses, itself.train(10), rtol=2e-5, atol=2e-5)


def test_a_stock_trainer_goes_on_alike_after_a_round_trip_through_dcp(tmp_path: Path) -> None:
    expected = trainer_losses(tmp_path / "run", steps=12, save_steps=6)
    step = tmp_path / "run" / "checkpoint-6"
    real = find_checkpoints(tmp_path / "run")
    assert [(found.step, found.problems) for found in real] == [(6, ()), (12, ())]
    assert real[0].holds == ("weights", "optimizer", "scheduler", "rng", "trainer state")

    to_dcp = convert_run(step, tmp_path / "dcp", to="dcp", chunks=2)
    back = convert_run(tmp_path / "dcp", tmp_path / "again" / "checkpoint-6", to="hf-trainer")

    assert to_dcp.left == back.left == ()
    found = trainer_losses(tmp_path / "again", steps=12, save_steps=100, resume=True)
    assert found == expected[6:]
    assert len(found) == 6
    again = tmp_path / "again" / "checkpoint-6"
    for name in ("trainer_state.json", "training_args.bin", "config.json"):
        assert (again / name).read_bytes() == (step / name).read_bytes()
    same = [torch.load(path / "optimizer.pt", weights_only=True) for path in (step, again)]
    assert same[0]["param_groups"] == same[1]["param_groups"]
    assert [*same[0]["state"]] == [*same[1]["state"]]
    for number, moments in same[0]["state"].items():
        for kind, value in moments.items():
            assert torch.equal(value, same[1]["state"][number][kind])


def trainer_losses(
    directory: Path, *, steps: int, save_steps: int, resume: bool = False
) -> list[float]:
    """Losses of a stock Trainer on a tiny Llama, with warmup, weight decay and shuffled data."""
    from transformers import Trainer, TrainingArguments

    from support.models.hf_models import tiny

    model = tiny("llama", seed=0)
    generator = torch.Generator().manual_seed(3)
    data = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(0, 131, (64, 12), generator=generator)
    ]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        save_steps=save_steps,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-6") if resume else None)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [row["loss"] for row in rows if not resume or row["step"] > 6]


def test_the_example_resumes_on_two_ranks_and_hands_back(tmp_path: Path) -> None:
    begun = MiniMindRun.begin("gen3")
    begun.train(4)
    begun.save(tmp_path / "a_resume.pth")
    example = Path(__file__).parents[2] / "examples" / "resume_minimind_2_ranks.py"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(example)]
    words += [str(tmp_path / "a_resume.pth"), "--spec", "n_heads=6", "--spec", "n_kv_heads=2"]
    words += ["--steps", "3", "--seq-len", "16", "--work", str(tmp_path / "out")]
    words += ["--back", str(tmp_path / "b_resume.pth")]

    run = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )

    assert run.returncode == 0, run.stderr[-3000:]
    assert "note: step 4 of 1 ranks became step 2 of 2 ranks" in run.stdout
    assert "resumed at epoch 0, step 2" in run.stdout
    assert "step     5  loss " in run.stdout
    found = torch.load(tmp_path / "b_resume.pth", weights_only=True)
    assert (found["step"], found["world_size"]) == (10, 1)
    back = MiniMindRun.begin("gen3")
    back.model.load_state_dict(found["model"])
    back.optimizer.load_state_dict(found["optimizer"])
    assert {int(moments["step"]) for moments in back.optimizer.state.values()} == {7}
