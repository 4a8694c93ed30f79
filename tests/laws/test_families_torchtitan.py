"""torchtitan's Llama 3 and Qwen3: names of its releases, and a bias that only chooses experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import CoverageError, NotExpressibleError
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import save_hf, tiny
from support.models.layers import randomise
from support.models.torchtitan import Release, Titan, TitanConfig

THETA = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
SCALED = {
    "rope_parameters": {
        "rope_theta": 1e4,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
NAMES: dict[Release, str] = {"0.3": "", "0.2": "-2025"}

CASES = [
    pytest.param("llama", {}, id="llama3"),
    pytest.param("llama", {"num_hidden_layers": 11}, id="llama3-eleven-layers"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama3-tied"),
    pytest.param("llama", {"head_dim": 24, **THETA}, id="llama3-wide-heads-theta"),
    pytest.param("llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-6}, id="llama3-multi-head"),
    pytest.param("llama", SCALED, id="llama3-scaled"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param("qwen3", {"tie_word_embeddings": True, **THETA}, id="qwen3-tied-theta"),
    pytest.param("qwen3", {"head_dim": 24}, id="qwen3-wide-heads"),
    pytest.param("qwen3_moe", {"num_experts": 11}, id="qwen3-eleven-experts"),
    pytest.param("qwen3_moe", {"mlp_only_layers": [1]}, id="qwen3-some-dense"),
    pytest.param("qwen3_moe", {"num_experts_per_tok": 1}, id="qwen3-one-expert"),
]


def family(model_type: str, release: Release) -> str:
    return f"torchtitan-{'llama3' if model_type == 'llama' else 'qwen3'}{NAMES[release]}"


def titan(hf: Any, release: Release = "0.3", **fields: Any) -> Titan:
    """The model that torchtitan would build for these sizes, without weights."""
    config = hf.config
    experts: dict[str, Any] = {}
    if config.model_type == "qwen3_moe":
        experts = {
            "num_experts": config.num_experts,
            "top_k": config.num_experts_per_tok,
            "moe_hidden_dim": config.moe_intermediate_size,
            "dense_layers": tuple(config.mlp_only_layers or ()),
        }
    rope = config.rope_parameters
    order = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    sizes = TitanConfig(
        scaling=tuple(rope[name] for name in order) if "factor" in rope else None,
        release=release,
        is_qwen=config.model_type != "llama",
        n_layers=config.num_hidden_layers,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        enable_weight_tying=config.tie_word_embeddings,
        **{**experts, **fields},
    )
    return Titan(sizes).eval()


@pytest.mark.parametrize("release", ["0.2", "0.3"])
@pytest.mark.parametrize(("model_type", "overrides"), CASES)
def test_torchtitan_gives_the_logits_of_the_hf_model_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], release: Release
) -> None:
    hf = tiny(model_type, **overrides)
    source = save_hf(hf, tmp_path / "hf")
    report = convert(source, tmp_path / "titan.pth", to=family(model_type, release))
    assert report.target.family == family(model_type, release)
    model = titan(hf, release)
    model.load_state_dict(torch_tensors(tmp_path / "titan.pth"))
    assert difference(model, hf) < RIGHT

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


LINEAR = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("model_type", "overrides", "refused"),
    [
        pytest.param("llama", LINEAR, "rope_scaling", id="linear-scaling"),
        pytest.param("qwen3", LINEAR, "rope_scaling", id="scaled-qwen3"),
        pytest.param("qwen3", {"attention_bias": True}, "qkv_bias", id="biases"),
    ],
)
def test_what_torchtitan_cannot_hold_is_refused(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], refused: str
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError, match=refused):
        convert(source, tmp_path / "out", to=family(model_type, "0.3"))


def test_what_to_write_into_a_config_of_python_is_said(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    report = convert(source, tmp_path / "dcp", to="torchtitan-llama3")
    (note,) = (note for note in report.notes if "no parameter file" in note)
    assert "6 heads of 16 over 2" in note
    assert "theta 10000" in note


@pytest.mark.parametrize("release", ["0.2", "0.3"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe"])
def test_a_model_trained_in_torchtitan_becomes_an_hf_model_with_its_logits(
    tmp_path: Path, model_type: str, release: Release
) -> None:
    twin = tiny(model_type)
    assets = save_hf(twin, tmp_path / "assets")
    model = randomise(titan(twin, release, balances=False), seed=5)
    state_dict_saver.save(model.state_dict(), checkpoint_id=tmp_path / "dcp")
    source = family(model_type, release)
    convert(tmp_path / "dcp", tmp_path / "hf", to="hf", from_=source, assets=assets)
    assert difference(load_hf(tmp_path / "hf"), model) < RIGHT

    convert(tmp_path / "hf", tmp_path / "back.pth", to=source)
    made = {k: v for k, v in torch_tensors(tmp_path / "back.pth").items() if "expert_bias" not in k}
    assert_same(made, dict(model.state_dict()))


@pytest.mark.parametrize("release", ["0.2", "0.3"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_training_checkpoint_has_its_weights_beside_the_other_containers(
    tmp_path: Path, model_type: str, release: Release
) -> None:
    """torchtitan saves the weights without a container of their own, the rest in four."""
    twin = tiny(model_type)
    assets = save_hf(twin, tmp_path / "assets")
    model = randomise(titan(twin, release, balances=False), seed=5)
    weights = model.state_dict()
    moments = {f"state.{key}.exp_avg": torch.zeros_like(value) for key, value in weights.items()}
    step = {
        **weights,
        "optimizer": {**moments, "param_groups.norm.weight.lr": 1e-3},
        "lr_scheduler": {"last_epoch": 5},
        "train_state": {"step": torch.tensor(5)},
        "dataloader": {"dp_rank_0": b"abc"},
    }
    state_dict_saver.save(step, checkpoint_id=tmp_path / "step-5")
    source = family(model_type, release)
    report = convert(tmp_path / "step-5", tmp_path / "hf", to="hf", from_=source, assets=assets)
    assert difference(load_hf(tmp_path / "hf"), model) < RIGHT
    assert {key.partition(".")[0] for key in report.left} == {
        *("optimizer", "lr_scheduler", "train_state", "dataloader")
    }
    fresh = titan(twin, release, balances=False)
    load_init_weights(fresh, tmp_path / "step-5")
    assert_same(dict(fresh.state_dict()), weights)


@pytest.mark.parametrize("release", ["0.2", "0.3"])
def test_stock_dcp_load_finds_every_key_that_torchtitan_asks_for(
    tmp_path: Path, release: Release
) -> None:
    hf = tiny("qwen3_moe")
    convert(save_hf(hf, tmp_path / "hf"), tmp_path / "dcp", to=family("qwen3_moe", release))
    model = randomise(titan(hf, release), seed=7)
    state = model.state_dict()
    assert sum("expert_bias" in key for key in state) == 3
    state_dict_loader.load(state, checkpoint_id=tmp_path / "dcp")
    model.load_state_dict(state)
    assert difference(model, hf) < RIGHT


def test_a_live_model_is_loaded_both_ways(tmp_path: Path) -> None:
    hf = tiny("qwen3_moe")
    source = save_hf(hf, tmp_path / "hf")
    model = randomise(titan(hf), seed=7)
    load_init_weights(model, source)
    assert difference(model, hf) < RIGHT

    torch.save(model.state_dict(), tmp_path / "titan.pth")
    other = tiny("qwen3_moe", seed=3)
    report = load_init_weights(other, tmp_path / "titan.pth", assets=source)
    assert {key for key, _ in report.ignored} == {
        f"layers.{layer}.moe.expert_bias_E" for layer in range(3)
    }
    assert difference(other, hf) < RIGHT


def test_a_bias_that_chooses_experts_is_lost_only_on_request(tmp_path: Path) -> None:
    hf = tiny("qwen3_moe")
    assets = save_hf(hf, tmp_path / "assets")
    model = randomise(titan(hf), seed=5)
    biases = [name for name, _ in model.named_buffers() if name.endswith("expert_bias_E")]
    torch.save(model.state_dict(), tmp_path / "titan.pth")
    with pytest.raises(CoverageError, match="3 unknown") as raised:
        convert(tmp_path / "titan.pth", tmp_path / "hf", form="hf", assets=assets)
    assert "--allow selection_bias" in str(raised.value)
    assert not check(tmp_path / "titan.pth", to="hf", assets=assets)

    allow = ["selection_bias"]
    report = convert(tmp_path / "titan.pth", tmp_path / "hf", form="hf", assets=assets, allow=allow)
    assert sorted(key for key, _ in report.ignored) == sorted(biases)
    assert check(tmp_path / "titan.pth", to="hf", assets=assets, allow=allow)
    unbiased = titan(hf, balances=False)
    unbiased.load_state_dict({k: v for k, v in model.state_dict().items() if k not in biases})
    assert difference(load_hf(tmp_path / "hf"), unbiased) < RIGHT
    assert difference(model, unbiased) > RIGHT


def test_a_bias_of_zeros_is_no_reason_to_refuse(tmp_path: Path) -> None:
    hf = tiny("qwen3_moe")
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "titan.pth", to="torchtitan-qwen3")
    coverage = check(tmp_path / "titan.pth", to="hf", assets=source)
    assert coverage
    assert {fault.key for fault in coverage.ignored} == {
        f"layers.{layer}.moe.expert_bias_E" for layer in range(3)
    }


def test_frequencies_that_the_first_release_stored_are_dropped(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "titan.pth", to="torchtitan-llama3-2025")
    state = torch_tensors(tmp_path / "titan.pth")
    torch.save(state | {"freqs_cis": torch.ones(64, 8)}, tmp_path / "titan.pth")
    report = convert(
        tmp_path / "titan.pth",
        tmp_path / "back",
        form="hf",
        from_="torchtitan-llama3-2025",
        assets=source,
    )
    assert [key for key, _ in report.ignored] == ["freqs_cis"]
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize("name", ["torchtitan-llama3", "torchtitan-qwen3"])
def test_without_a_config_the_user_says_what_shapes_do_not(tmp_path: Path, name: str) -> None:
    hf = tiny("llama" if "llama" in name else "qwen3")
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "titan.pth", to=name)
    convert(
        tmp_path / "titan.pth",
        tmp_path / "back",
        form="hf",
        from_=name,
        spec="heads=6,kv_heads=2,theta=1e4,eps=1e-5",
    )
    assert difference(load_hf(tmp_path / "back"), hf) < RIGHT
