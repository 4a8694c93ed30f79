"""Optimizer state out of DeepSpeed's flat vectors, and what may not become MiniMind's AdamW."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load

from dcpconv import open_checkpoint
from dcpconv.core.errors import NotACheckpointError
from dcpconv.runs.carrying import OptimizerError, convert_run, read_training_state
from support.checkpoints.stock import flat, nested_of_dcp
from support.checkpoints.zero_files import Run, write_zero
from support.models.minimind import MiniMind, MiniMindConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 11,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "dtype": "float32",
}
_AT = "model.layers.0."
MATRICES = {
    "model.embed_tokens.weight": (11, 12),
    _AT + "self_attn.q_proj.weight": (12, 12),
    _AT + "self_attn.k_proj.weight": (4, 12),
    _AT + "self_attn.v_proj.weight": (4, 12),
    _AT + "self_attn.o_proj.weight": (12, 12),
    _AT + "mlp.gate_proj.weight": (10, 12),
    _AT + "mlp.up_proj.weight": (10, 12),
    _AT + "mlp.down_proj.weight": (12, 10),
}
VECTORS = {
    _AT + "input_layernorm.weight": (12,),
    _AT + "post_attention_layernorm.weight": (12,),
    "model.norm.weight": (12,),
}


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def _run(stage: int, **more: Any) -> Run:
    every = {**MATRICES, **VECTORS}
    return Run(
        groups=[_random(MATRICES, 0), _random(VECTORS, 1)],
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        moments={"exp_avg": _random(every, 2), "exp_avg_sq": _random(every, 3)},
        ranks=3,
        stage=stage,
        **more,
    )


def _trainer_step(path: Path, run: Run) -> Path:
    """What Trainer leaves under DeepSpeed, but for its own pickles."""
    write_zero(path, run)
    (path / "config.json").write_text(json.dumps(CONFIG))
    half = {key: value.bfloat16() for key, value in run.weights.items()}
    save_file(half, path / "model.safetensors", metadata={"format": "pt"})
    counted = {"global_step": run.step, "epoch": 0.5, "max_steps": 8}
    (path / "trainer_state.json").write_text(json.dumps(counted))
    return path


@pytest.mark.parametrize("count", [None, 4], ids=["tensor", "number"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_and_moments_come_under_their_names(
    stage: int, count: object, tmp_path: Path
) -> None:
    run = _run(stage, count=count)
    report = convert_run(_trainer_step(tmp_path / "in", run), tmp_path / "out", to="dcp")

    found = flat(nested_of_dcp(tmp_path / "out"))

    assert report.source_kind == "hf-trainer"
    for key, weight in run.weights.items():
        assert torch.equal(found[f"model.{key}"], weight), key
        for name, moments in run.moments.items():
            assert torch.equal(found[f"optim.state.{key}.{name}"], moments[key]), key
        assert torch.equal(found[f"optim.state.{key}.step"], torch.tensor(4.0))
    state = read_training_state(tmp_path / "out")
    assert [group.params for group in state.groups] == [tuple(MATRICES), tuple(VECTORS)]
    assert [group.values["weight_decay"] for group in state.groups] == [0.1, 0.05]


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_goes_on_without_deepspeed(stage: int, tmp_path: Path) -> None:
    run = _run(stage)
    convert_run(_trainer_step(tmp_path / "in", run), tmp_path / "checkpoint-4", to="hf-trainer")

    weights = load_file(tmp_path / "checkpoint-4/model.safetensors")
    optimizer = torch.load(tmp_path / "checkpoint-4/optimizer.pt")

    assert torch.equal(weights["model.norm.weight"], run.weights["model.norm.weight"])
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    assert sizes == [len(MATRICES), len(VECTORS)]
    ids = [number for group in optimizer["param_groups"] for number in group["params"]]
    order = [*MATRICES, *VECTORS]  # of the modules of a Llama, and so of its parameters()
    for number, key in zip(ids, order, strict=True):
        assert torch.equal(optimizer["state"][number]["exp_avg"], run.moments["exp_avg"][key]), key


def test_a_checkpoint_of_trainer_is_its_16_bit_model_and_says_where_the_rest_is(
    tmp_path: Path,
) -> None:
    step = _trainer_step(tmp_path / "in", _run(2))

    catalog = open_checkpoint(step)

    assert catalog.form == "hf"
    assert "fp32 weights of DeepSpeed" in catalog.notes[-1]
    assert open_checkpoint(step / "global_step4").form == "ranks"


def test_weights_without_optimizer_are_no_run(tmp_path: Path) -> None:
    at = write_zero(tmp_path, _run(2))
    for file in at.glob("*_optim_states.pt"):
        file.unlink()

    with pytest.raises(NotACheckpointError, match="no optimizer state"):
        read_training_state(tmp_path)


OTHERS = [
    pytest.param({"exp_avg": "momentum_buffer"}, {"momentum": 0.9}, id="sgd"),
    pytest.param({"step": "step", "exp_avg": "sum"}, {"lr_decay": 0.0}, id="adagrad"),
    pytest.param(
        {"step": "step", "exp_avg": "z", "exp_avg_sq": "exp_avg_sq"},
        {"betas": (0.9, 0.999)},
        id="schedule-free",
    ),
    pytest.param({}, {"momentum": 0.0}, id="plain-sgd"),
]


@pytest.mark.parametrize(("names", "values"), OTHERS)
def test_minimind_takes_the_state_of_adamw_alone(
    names: dict[str, str], values: dict[str, object], tmp_path: Path
) -> None:
    step = _trainer_optimizer(tmp_path / "in", names, values)

    with pytest.raises(OptimizerError, match="not AdamW") as caught:
        convert_run(step, tmp_path / "out_resume.pth", to="minimind")

    assert "exp_avg" in str(caught.value)
    assert not (tmp_path / "out_resume.pth").exists()


def test_minimind_goes_on_where_trainer_state_says(tmp_path: Path) -> None:
    names = {"step": "step", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    step = _trainer_optimizer(tmp_path / "in", names, {"betas": (0.9, 0.999)})
    convert_run(step, tmp_path / "out_resume.pth", to="minimind", family="minimind3")

    found = torch.load(tmp_path / "out_resume.pth")

    assert (found["epoch"], found["step"]) == (0, 6)


def test_paged_adamw_of_bitsandbytes_is_adamw(tmp_path: Path) -> None:
    names = {"step": "step", "exp_avg": "state1", "exp_avg_sq": "state2"}
    step = _trainer_optimizer(tmp_path / "in", names, {"betas": (0.9, 0.999)}, count=4)

    state = read_training_state(step)

    assert state.moments["model.norm.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state.moments["model.norm.weight"]["step"] == 4.0


def test_8_bit_moments_are_refused(tmp_path: Path) -> None:
    names = {"exp_avg": "state1", "exp_avg_sq": "absmax1"}
    step = _trainer_optimizer(tmp_path / "in", names, {"betas": (0.9, 0.999)})

    with pytest.raises(OptimizerError, match="8 bits"):
        read_training_state(step)


def _trainer_optimizer(
    path: Path, names: dict[str, str], values: dict[str, object], *, count: object = None
) -> Path:
    """A step of Trainer with one optimizer file, whose state has other names."""
    path.mkdir()
    run = _run(2)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(run.weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 6, "epoch": 0.5}))
    step = torch.tensor(4.0) if count is None else count
    order = [*MATRICES, *VECTORS]
    states = {
        number: {
            new: step if old == "step" else run.moments[old][key] for old, new in names.items()
        }
        for number, key in enumerate(order)
    }
    ids = [[order.index(key) for key in group] for group in (MATRICES, VECTORS)]
    groups = [{"lr": 1e-3, "weight_decay": 0.1, **values, "params": group} for group in ids]
    torch.save({"state": states if names else {}, "param_groups": groups}, path / "optimizer.pt")
    return path


def _telling_run() -> Run:
    """Moments tell their parameter: its value, and its value plus one."""
    matrices, vectors = _random(MATRICES, 0), _random(VECTORS, 1)
    every = {**matrices, **vectors}
    return Run(
        groups=[matrices, vectors],
        moments={"exp_avg": every, "exp_avg_sq": {key: v + 1 for key, v in every.items()}},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        ranks=3,
        stage=2,
    )


def _of_wider_heads(path: Path, run: Run) -> Path:
    """Heads of four, so that naming them otherwise moves elements."""
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4}
    _trainer_step(path, run)
    (path / "config.json").write_text(json.dumps({**CONFIG, **sizes}))
    return path


OF_KINDS = [
    pytest.param("lingua", "model.", "optim.state.", "layers.0.attention.wq.weight", id="lingua"),
    pytest.param(
        "torchtitan",
        "",
        "optimizer.state.",
        "layers.0.attention.qkv_linear.wq.weight",
        id="torchtitan",
    ),
]


@pytest.mark.parametrize(("kind", "root", "optimizer", "turned"), OF_KINDS)
def test_moments_follow_their_parameters_to_other_trainers(
    kind: Any, root: str, optimizer: str, turned: str, tmp_path: Path
) -> None:
    run = _telling_run()
    report = convert_run(_of_wider_heads(tmp_path / "in", run), tmp_path / "out", to=kind)

    found = flat(nested_of_dcp(tmp_path / "out"))

    first = [key for key in found if key.startswith(optimizer) and key.endswith(".exp_avg")]
    assert len(first) == report.parameters == len(MATRICES) + len(VECTORS)
    for key in first:
        weight = found[root + key.removeprefix(optimizer).removesuffix(".exp_avg")]
        assert torch.equal(found[key], weight), key
        assert torch.equal(found[f"{key}_sq"], weight + 1), key
    assert found[root + turned].shape == (12, 12)
    assert not torch.equal(found[root + turned], run.weights[f"{_AT}self_attn.q_proj.weight"])


def test_moments_follow_their_parameters_to_minimind(tmp_path: Path) -> None:
    run = _telling_run()
    out = tmp_path / "a_resume.pth"
    convert_run(_of_wider_heads(tmp_path / "in", run), out, to="minimind", family="minimind3")

    found = torch.load(out, weights_only=True)

    order = [key for key, _ in _minimind_parameters(found["model"])]
    state = found["optimizer"]["state"]
    assert found["optimizer"]["param_groups"][0]["params"] == [*range(len(order))] == [*state]
    for number, key in enumerate(order):
        assert torch.equal(state[number]["exp_avg"], found["model"][key]), key
        assert torch.equal(state[number]["exp_avg_sq"], found["model"][key] + 1), key


def _minimind_parameters(weights: Mapping[str, torch.Tensor]) -> list[tuple[str, Any]]:
    config = MiniMindConfig(generation="gen3", n_layers=1, tied=True)
    named = MiniMind(config).named_parameters()
    return [(name, parameter) for name, parameter in named if name in weights]


def test_torchtitan_reads_what_is_carried_to_it(tmp_path: Path) -> None:
    """Its optimizer container and its schedulers take the state; nothing is missing."""
    reason = "needs .[interop]"
    utils = pytest.importorskip("torchtitan.components.optimizer.utils", reason=reason)
    run = _telling_run()
    convert_run(_of_wider_heads(tmp_path / "in", run), tmp_path / "out", to="torchtitan")
    weights = {key: v for key, v in flat(nested_of_dcp(tmp_path / "out")).items() if "." in key}
    no_parameters = ("optimizer.", "lm_head.")  # the head is the embedding
    names = [key for key in weights if not key.startswith(no_parameters)]
    parameters = [(name, torch.nn.Parameter(torch.zeros_like(weights[name]))) for name in names]
    groups = [{"params": parameters, "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    utils.init_optim_state(optimizer)
    state = {
        **{name: parameter.detach() for name, parameter in parameters},
        "optimizer": utils.get_flat_optim_state_dict(optimizer),
        "train_state": {"step": 0, "ntokens_seen": -1},
        "lr_scheduler": {"last_epoch": 0},
    }

    load(state, checkpoint_id=tmp_path / "out")
    utils.load_flat_optim_state_dict(optimizer, state["optimizer"])

    assert state["train_state"] == {"step": 4, "ntokens_seen": 0}
    assert state["lr_scheduler"] == {"last_epoch": 4}
    for name, parameter in parameters:
        assert torch.equal(optimizer.state[parameter]["exp_avg"], parameter), name
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], parameter + 1), name
        assert optimizer.state[parameter]["step"] == 4
