"""Optimizer state out of DeepSpeed's flat vectors, and what may not become MiniMind's AdamW."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpconv import open_checkpoint
from dcpconv.core.errors import NotACheckpointError
from dcpconv.runs.carrying import OptimizerError, convert_run, read_training_state
from support.checkpoints.stock import flat, nested_of_dcp
from support.checkpoints.zero_files import Run, write_zero

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
