"""Training state between every two trainers, judged by torch and the trainers' own loading code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv.formats import dcp
from dcpconv.runs import find_checkpoints
from dcpconv.runs.carrying import convert_run
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp
from support.models.hf_models import save_hf
from support.runs.carried import SIZES, hf_trainer, minimind, telling_optimizer
from support.runs.training import MiniMindRun


def assert_moments_follow(state: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> None:
    assert state
    for key, moments in state.items():
        assert torch.equal(moments["exp_avg"], model[key]), key
        assert torch.equal(moments["exp_avg_sq"], model[key] + 1), key
        assert moments["step"] == 7


TO_DCP: list[tuple[str, str, str, int]] = [
    ("gen2", "dcp", "lingua", 29),
    ("gen3", "lingua", "lingua", 29),
    ("gen4", "dcp", "hf-qwen3", 35),
    ("llama", "lingua", "lingua", 30),
    ("llama", "dcp", "meta", 30),
    ("glm", "dcp", "chatglm3", 24),
]


@pytest.mark.parametrize(
    ("source", "to", "family", "parameters"), TO_DCP, ids=[f"{r[0]}-{r[2]}-{r[1]}" for r in TO_DCP]
)
def test_moments_are_relabelled_like_their_parameter(
    source: str, to: Any, family: str, parameters: int, tmp_path: Path
) -> None:
    if source.startswith("gen"):
        minimind(tmp_path / "a_resume.pth", source)  # type: ignore[arg-type]
        start = tmp_path / "a_resume.pth"
    else:
        start = tmp_path / "checkpoint-7"
        hf_trainer(start, source)

    sizes = SIZES if source.startswith("gen") else None
    report = convert_run(start, tmp_path / "out", to=to, family=family, sizes=sizes)

    found: Any = nested_of_dcp(tmp_path / "out")
    assert report.parameters == parameters
    assert report.moments == ("step", "exp_avg", "exp_avg_sq")
    assert_moments_follow(found["optim"]["state"], found["model"])
    params = [key for group in found["optim"]["param_groups"] for key in group["params"]]
    assert sorted(params) == sorted(found["optim"]["state"])
    turned = {("gen3", "lingua"), ("llama", "lingua"), ("llama", "meta")}
    assert report.relabelled == (6 if (source, family) in turned else 0)  # q and k of 3 layers


THERE_AND_BACK = [
    *(
        (model_type, head)
        for model_type in ("llama", "qwen2", "qwen3")
        for head in ("untied", "tied")
    ),
    ("glm", "untied"),  # ChatGLM3 is never tied
]


@pytest.mark.parametrize(("model_type", "head"), THERE_AND_BACK)
def test_hugging_face_and_back_by_another_naming_is_bit_for_bit(
    model_type: str, head: str, tmp_path: Path
) -> None:
    start, end = tmp_path / "checkpoint-7", tmp_path / "back" / "checkpoint-7"
    hf_trainer(start, model_type, tie_word_embeddings=head == "tied")
    family = {"glm": "chatglm3", "llama": "lingua"}.get(model_type)

    convert_run(start, tmp_path / "between", to="dcp", family=family)
    convert_run(tmp_path / "between", end, to="hf-trainer", family=f"hf-{model_type}", assets=start)

    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(path / name) for path in (start, end))
        assert_same_bits(flat(_by_text(other)), flat(_by_text(one)))
        assert other.get("param_groups") == one.get("param_groups")
    assert (end / "trainer_state.json").exists()
    (found,) = find_checkpoints(tmp_path / "back")
    assert found.is_complete


def _by_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _by_text(item) for key, item in value.items()}
    return value


def test_a_trainer_gets_ids_by_its_own_groups(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer

    minimind(tmp_path / "a_resume.pth", "gen4")
    end = tmp_path / "checkpoint-7"

    report = convert_run(
        tmp_path / "a_resume.pth", end, to="hf-trainer", family="hf-qwen3", sizes=SIZES
    )

    model = AutoModelForCausalLM.from_pretrained(end)
    decay = set(Trainer.get_decay_parameter_names(None, model))
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if (n in decay) == wanted]}
        for wanted in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(torch.load(end / "optimizer.pt", weights_only=True))
    assert_moments_follow(
        {name: optimizer.state[parameter] for name, parameter in named.items()},
        {name: parameter.detach() for name, parameter in named.items()},
    )
    assert json.loads((end / "trainer_state.json").read_text())["global_step"] == 7
    assert {name for name, _ in report.left} == {"step", "epoch", "world_size", "wandb_id"}
    (found,) = find_checkpoints(tmp_path)[:1]
    assert found.problems == ()


def test_our_dcp_is_what_torch_writes(tmp_path: Path) -> None:
    run = minimind(tmp_path / "a_resume.pth", "gen3")
    weights, moments = get_state_dict(run.model, run.optimizer)
    scaler, schedule = run.scaler.state_dict(), run.scheduler.state_dict()
    counted = {"epoch": 0, "step": 7, "world_size": 1, "wandb_id": None}
    state = {"model": weights, "optim": moments, **counted, "scaler": scaler, "scheduler": schedule}
    save(state, checkpoint_id=tmp_path / "stock")

    convert_run(tmp_path / "a_resume.pth", tmp_path / "ours", to="dcp")

    stock, ours = (dcp.read_catalog(tmp_path / name) for name in ("stock", "ours"))
    assert ours.tensors.keys() == stock.tensors.keys()
    assert ours.objects == stock.objects
    assert ours.paths == stock.paths
    for key, entry in stock.tensors.items():
        assert (ours.tensors[key].shape, ours.tensors[key].dtype) == (entry.shape, entry.dtype)
    assert_same_bits(
        flat(nested_of_dcp(tmp_path / "ours")), flat(nested_of_dcp(tmp_path / "stock"))
    )


def test_torch_sets_the_optimizer_from_it(tmp_path: Path) -> None:
    begun = MiniMindRun.begin("gen4")
    begun.train(2)
    begun.save(tmp_path / "a_resume.pth", half=False)
    convert_run(tmp_path / "a_resume.pth", tmp_path / "dcp", to="dcp")

    fresh = MiniMindRun.begin("gen4")
    weights, moments = get_state_dict(fresh.model, fresh.optimizer)
    state: dict[str, Any] = {"model": weights, "optim": moments}
    load(state, checkpoint_id=tmp_path / "dcp")
    set_state_dict(
        fresh.model,
        fresh.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
    )

    expected, found = begun.optimizer.state_dict(), fresh.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert_same_bits(flat(_by_text(found["state"])), flat(_by_text(expected["state"])))


def test_minimind_and_back_keeps_everything_beside(tmp_path: Path) -> None:
    critic = {"head.weight": torch.arange(6.0).reshape(2, 3)}
    moments = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"params": [0]}]}
    minimind(tmp_path / "a_resume.pth", "gen4", critic_model=critic, critic_optimizer=moments)

    convert_run(tmp_path / "a_resume.pth", tmp_path / "dcp", to="dcp")
    convert_run(tmp_path / "dcp", tmp_path / "b_resume.pth", to="minimind")

    one, other = (
        torch.load(tmp_path / name, weights_only=True) for name in ("a_resume.pth", "b_resume.pth")
    )
    assert other.keys() == one.keys()
    for key in one.keys() - {"model", "optimizer", "critic_model", "critic_optimizer"}:
        assert other[key] == one[key], key
    for key in ("model", "optimizer", "critic_model", "critic_optimizer"):
        assert_same_bits(flat(_by_text(other[key])), flat(_by_text(one[key])))
    assert [*other["critic_optimizer"]["state"]] == [0]
    assert other["optimizer"]["param_groups"] == one["optimizer"]["param_groups"]


def test_a_disabled_scaler_stays_a_disabled_scaler(tmp_path: Path) -> None:
    minimind(tmp_path / "a_resume.pth", "gen4", scaler={})

    convert_run(tmp_path / "a_resume.pth", tmp_path / "dcp", to="dcp")
    convert_run(tmp_path / "dcp", tmp_path / "b_resume.pth", to="minimind")

    assert torch.load(tmp_path / "b_resume.pth")["scaler"] == {}


def test_the_older_form_with_a_namespace_is_read_by_name_alone(tmp_path: Path) -> None:
    run = MiniMindRun.begin("gen2")
    run.train(2)
    args = argparse.Namespace(epochs=3, lr=1e-4)
    older = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": 1,
        "step": 2,
        "args": args,
    }
    torch.save(older, tmp_path / "a.pth")

    convert_run(tmp_path / "a.pth", tmp_path / "dcp", to="dcp")
    report = convert_run(tmp_path / "dcp", tmp_path / "b_resume.pth", to="minimind")

    assert "args is stored as a dict" in report.notes
    found = torch.load(tmp_path / "b_resume.pth", weights_only=True)
    assert found["args"] == vars(args)
    assert (found["epoch"], found["step"]) == (1, 2)


RESCALED = [(None, 2, 40), (2, 2, 40), (4, 4, 20), (1, 1, 80), (3, 3, 26)]


@pytest.mark.parametrize(("asked", "world_size", "step"), RESCALED)
def test_minimind_s_step_is_rescaled_only_when_asked(
    asked: int | None, world_size: int, step: int, tmp_path: Path
) -> None:
    minimind(tmp_path / "a_resume.pth", "gen3", step=40, world_size=2)

    report = convert_run(tmp_path / "a_resume.pth", tmp_path / "out", to="dcp", world_size=asked)

    found = nested_of_dcp(tmp_path / "out")
    assert (found["step"], found["world_size"]) == (step, world_size)
    assert any(note.startswith("step 40") for note in report.notes) == (asked != 2)


def test_lingua_s_train_states_come_back(tmp_path: Path) -> None:
    minimind(tmp_path / "a_resume.pth", "gen3")
    step = tmp_path / "0000000007"
    first = convert_run(tmp_path / "a_resume.pth", step, to="lingua", sizes=SIZES)
    assert [name for name, _ in first.left] == ["train_state"]
    for rank in range(2):
        (step / f"train_state_{rank:05d}.json").write_text(json.dumps({"step": 7, "rank": rank}))

    convert_run(step, tmp_path / "dcp", to="dcp")
    convert_run(tmp_path / "dcp", tmp_path / "0000000008", to="lingua", assets=step)

    again = tmp_path / "0000000008"
    assert (again / "params.json").exists()
    for rank in range(2):
        name = f"train_state_{rank:05d}.json"
        assert json.loads((again / name).read_text()) == json.loads((step / name).read_text())
    assert_same_bits(flat(nested_of_dcp(again)), flat(nested_of_dcp(step)))


def test_shards_of_fsdp_and_flat_files_of_fsdp_are_read_too(tmp_path: Path) -> None:
    model = hf_trainer(tmp_path / "checkpoint-7", "llama")
    weights, moments = get_state_dict(model, telling_optimizer(model))
    sharded, flat_ = tmp_path / "sharded", tmp_path / "flat"
    for step in (sharded, flat_):
        step.mkdir()
        for name in ("trainer_state.json", "scheduler.pt", "config.json"):
            (step / name).write_bytes((tmp_path / "checkpoint-7" / name).read_bytes())
    save({"model": weights}, checkpoint_id=sharded / "pytorch_model_fsdp_0")
    save({"optimizer": moments}, checkpoint_id=sharded / "optimizer_0")
    save_hf(model, flat_)
    torch.save(moments, flat_ / "optimizer.bin")

    for step in (sharded, flat_):
        out = tmp_path / f"{step.name}-dcp"
        report = convert_run(step, out, to="dcp")
        found: Any = nested_of_dcp(out)
        assert report.parameters == 30
        assert_moments_follow(found["optim"]["state"], found["model"])
        assert found["trainer_state"]["global_step"] == 7


def test_two_groups_become_one_and_what_that_loses_is_listed(tmp_path: Path) -> None:
    hf_trainer(tmp_path / "checkpoint-7", "qwen3", tie_word_embeddings=True)

    report = convert_run(
        tmp_path / "checkpoint-7", tmp_path / "a_resume.pth", to="minimind", family="minimind4"
    )

    assert ("weight_decay of group 1", "0.0 becomes 0.5") in report.left
    found = torch.load(tmp_path / "a_resume.pth", weights_only=True)
    run = MiniMindRun.begin("gen4")
    run.optimizer.load_state_dict(found["optimizer"])
    run.model.load_state_dict(found["model"])
    assert_moments_follow(
        {name: run.optimizer.state[p] for name, p in run.model.named_parameters()},
        run.model.state_dict(),
    )
    assert (found["epoch"], found["step"]) == (1, 2)
