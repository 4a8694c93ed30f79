"""Classes that are a Llama but for a few things: what they share goes over, the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from lingua_model import LinguaModel
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import save_hf, tiny
from support.models.torchtitan import Titan, TitanConfig

GRANITE = {"attention_multiplier": 0.25}
"""The usual factor of heads of 16: all four multipliers are neutral."""

PLAIN = [
    pytest.param("smollm3", {}, id="smollm3"),
    pytest.param("smollm3", {"tie_word_embeddings": True}, id="smollm3-tied"),
    pytest.param("smollm3", {"num_hidden_layers": 11}, id="smollm3-eleven-layers"),
    pytest.param(
        "smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 4}, id="smollm3-interval"
    ),
    pytest.param("ernie4_5", {}, id="ernie4_5"),
    pytest.param("ernie4_5", {"tie_word_embeddings": True}, id="ernie4_5-tied"),
    pytest.param("ernie4_5", {"num_hidden_layers": 11}, id="ernie4_5-eleven-layers"),
    pytest.param("ernie4_5", {"head_dim": 24, "num_key_value_heads": 3}, id="ernie4_5-wide-heads"),
    pytest.param("helium", {}, id="helium"),
    pytest.param("helium", {"num_key_value_heads": 6}, id="helium-multi-head"),
    pytest.param("internlm3", {}, id="internlm3"),
    pytest.param("internlm3", {"head_dim": 24}, id="internlm3-wide-heads"),
    pytest.param("seed_oss", {"attention_bias": False, "head_dim": 24}, id="seed_oss"),
    pytest.param("cwm", {}, id="cwm"),
    pytest.param("ministral3", {}, id="ministral3"),
    pytest.param("granite", GRANITE, id="granite"),
    pytest.param("granite", {**GRANITE, "tie_word_embeddings": True}, id="granite-tied"),
]
"""Models that compute what a plain Llama computes."""

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
YARN = {
    "rope_parameters": {
        "rope_theta": 1e4,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
BIASED = {"attention_bias": True, "mlp_bias": True}

ONLY_HF = [
    pytest.param("smollm3", BIASED, id="smollm3-biased"),
    pytest.param("smollm3", YARN, id="smollm3-yarn"),
    pytest.param("ernie4_5", {"use_bias": True}, id="ernie4_5-biased"),
    pytest.param("ernie4_5", SCALED, id="ernie4_5-scaled"),
    pytest.param("internlm3", BIASED, id="internlm3-biased"),
    pytest.param("seed_oss", {"attention_out_bias": True, "mlp_bias": True}, id="seed_oss-biased"),
    pytest.param("helium", {"mlp_bias": True}, id="helium-biased"),
    pytest.param("cwm", {**SCALED, "mlp_bias": True}, id="cwm-scaled-biased"),
    pytest.param("granite", {**GRANITE, **BIASED}, id="granite-biased"),
    pytest.param(
        "ministral3",
        {"rope_parameters": {**YARN["rope_parameters"], "llama_4_scaling_beta": 0.0}},
        id="ministral3-yarn",
    ),
]
"""Models that transformers' Llama holds, and that trainers without biases and scaling do not."""


def made(tmp_path: Path, model_type: str, overrides: dict[str, Any]) -> tuple[Any, Path]:
    if overrides.get("no_rope_layer_interval"):
        overrides = {**overrides, "no_rope_layer_interval": 99}
    model = tiny(model_type, **overrides)
    return model, save_hf(model, tmp_path / "hf")


@pytest.mark.parametrize(("model_type", "overrides"), [*PLAIN, *ONLY_HF])
def test_llama_computes_the_same_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model, source = made(tmp_path, model_type, overrides)
    convert(source, tmp_path / "llama", form="hf", to="hf-llama")
    assert json.loads((tmp_path / "llama/config.json").read_text())["model_type"] == "llama"
    assert difference(load_hf(tmp_path / "llama"), model) < RIGHT

    convert(tmp_path / "llama", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), model) == 0.0


@pytest.mark.parametrize(("model_type", "overrides"), PLAIN)
def test_lingua_computes_the_same_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    hf, source = made(tmp_path, model_type, overrides)
    assert check(source, to="lingua")
    convert(source, tmp_path / "lingua", to="lingua")
    params = json.loads((tmp_path / "lingua/params.json").read_text())
    model = LinguaModel.from_params(params)
    state = model.state_dict()
    load({"model": state}, checkpoint_id=tmp_path / "lingua")
    model.load_state_dict(state)
    assert difference(model.eval(), hf) < RIGHT

    convert(tmp_path / "lingua", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), hf) == 0.0


STRETCHED = pytest.param("ernie4_5", SCALED, id="ernie4_5-scaled")


@pytest.mark.parametrize(("model_type", "overrides"), [*PLAIN, STRETCHED])
def test_torchtitan_computes_the_same_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    hf, source = made(tmp_path, model_type, overrides)
    convert(source, tmp_path / "titan.pth", to="torchtitan-llama3")
    config = hf.config
    rope = config.rope_parameters
    stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    sizes = TitanConfig(
        scaling=tuple(rope[name] for name in stretch) if "factor" in rope else None,
        release="0.3",
        is_qwen=False,
        n_layers=config.num_hidden_layers,
        n_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", 16),
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        enable_weight_tying=config.tie_word_embeddings,
    )
    model = Titan(sizes).eval()
    model.load_state_dict(torch_tensors(tmp_path / "titan.pth"))
    assert difference(model, hf) < RIGHT

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize(("model_type", "overrides"), PLAIN)
def test_meta_holds_what_lingua_holds(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    hf, source = made(tmp_path, model_type, overrides)
    if overrides.get("head_dim", 16) != 16:
        with pytest.raises(NotExpressibleError, match="head_dim: 24: Meta's Llama divides dim"):
            convert(source, tmp_path / "meta", form="dcp", to="meta")
        return
    convert(source, tmp_path / "meta", form="dcp", to="meta")
    convert(tmp_path / "meta", tmp_path / "llama", form="hf", to="hf-llama")
    assert difference(load_hf(tmp_path / "llama"), hf) < RIGHT
    convert(tmp_path / "meta", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_keys_alone_are_those_of_the_common_class(tmp_path: Path) -> None:
    """A class with Llama's keys is known by its config only; without one, nothing has changed."""
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "bare.pth")
    (tmp_path / "alone").mkdir()
    (tmp_path / "bare.pth").rename(tmp_path / "alone" / "bare.pth")
    report = convert(
        tmp_path / "alone" / "bare.pth",
        tmp_path / "lingua.pth",
        to="lingua",
        spec="heads=6,kv_heads=2",
    )
    assert report.source.family == "hf-llama"
    convert(source, tmp_path / "expected.pth", to="lingua")
    found, expected = (
        torch.load(tmp_path / name, weights_only=True)["model"]
        for name in ("lingua.pth", "expected.pth")
    )
    assert_same(found, expected)


BETA = {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 16}

REFUSED = [
    pytest.param("smollm3", {"no_rope_layers": [1, 0, 1]}, {"no_rope_layers"}, id="smollm3-nope"),
    pytest.param(
        "smollm3",
        {
            "no_rope_layers": None,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
        },
        {"no_rope_layers", "sliding_window", "layer_types"},
        id="smollm3-interval-and-window",
    ),
    pytest.param("smollm3", BIASED, {"qkv_bias", "o_bias", "mlp_bias"}, id="smollm3-biased"),
    pytest.param("seed_oss", {}, {"qkv_bias"}, id="seed_oss"),
    pytest.param(
        "cwm",
        {"layer_types": None, "sliding_window": 8, "rope_parameters": None},
        {"sliding_window", "layer_types", "rope_scaling"},
        id="cwm-as-published",
    ),
    pytest.param(
        "ministral3",
        {"rope_parameters": {**BETA, "llama_4_scaling_beta": 0.1}},
        {"rope_scaling", "config.rope_parameters.llama_4_scaling_beta"},
        id="ministral3-temperature",
    ),
    pytest.param("arcee", {}, {"ungated", "activation"}, id="arcee"),
    pytest.param(
        "exaone4",
        {},
        {
            *("no_rope_layers", "qk_norm", "no_pre_norms", "post_norms"),
            *("sliding_window", "layer_types"),
        },
        id="exaone4",
    ),
    pytest.param("glm4", {}, {"partial_rotary", "qkv_bias", "post_norms"}, id="glm4"),
    pytest.param(
        "granite",
        {
            "attention_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        {"query_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"},
        id="granite",
    ),
    pytest.param("cohere", {}, {"norm", "parallel_residual", "logits_scaling"}, id="cohere"),
    pytest.param(
        "cohere",
        {"use_qk_norm": True, "logit_scale": 1.0},
        {"norm", "parallel_residual", "qk_norm_heads"},
        id="cohere-qk-norm",
    ),
    pytest.param("gemma", {}, {"norm", "activation", "embedding_multiplier"}, id="gemma"),
]


@pytest.mark.parametrize("to", ["lingua", "meta", "torchtitan-llama3", "hf-llama"])
@pytest.mark.parametrize(("model_type", "overrides", "names"), REFUSED)
def test_what_the_target_cannot_compute_is_refused_by_name(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], names: set[str], to: str
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    if to in {"meta", "torchtitan-llama3"} and model_type == "cwm":
        names = names - {"rope_scaling"}  # stretched as Llama 3 is, which both know
    if to == "hf-llama":
        names = names - {"rope_scaling", "activation", "o_bias", "mlp_bias"}
        names -= {"qkv_bias"} if "o_bias" in {*overrides} or model_type == "smollm3" else set()
    if not names:
        return  # transformers' Llama holds all of it
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused == names
    assert {fault.key for fault in check(source, to=to).refused} == names
    assert not (tmp_path / "out").exists()


BIASES = {"qkv_bias", "o_bias", "mlp_bias"}
LACKED = [
    pytest.param("smollm3", YARN, {"rope_scaling"}, id="smollm3-yarn"),
    pytest.param("ernie4_5", {"use_bias": True}, BIASES, id="ernie4_5-biased"),
    pytest.param("ernie4_5", SCALED, {"rope_scaling"}, id="ernie4_5-scaled"),
    pytest.param("internlm3", BIASED, BIASES, id="internlm3-biased"),
    pytest.param("helium", {"mlp_bias": True}, {"mlp_bias"}, id="helium-biased"),
    pytest.param(
        "seed_oss", {"attention_out_bias": True, "mlp_bias": True}, BIASES, id="seed_oss-biased"
    ),
    pytest.param(
        "cwm", {**SCALED, "mlp_bias": True}, {"mlp_bias", "rope_scaling"}, id="cwm-scaled-biased"
    ),
    pytest.param("granite", {**GRANITE, **BIASED}, BIASES, id="granite-biased"),
    pytest.param(
        "ministral3",
        {"rope_parameters": {**YARN["rope_parameters"], "llama_4_scaling_beta": 0.0}},
        {"rope_scaling"},
        id="ministral3-yarn",
    ),
]
"""The rest of ``ONLY_HF``, and what trainers lack."""


@pytest.mark.parametrize("to", ["lingua", "meta", "torchtitan-llama3"])
@pytest.mark.parametrize(("model_type", "overrides", "names"), LACKED)
def test_what_trainers_lack_is_refused_by_name(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], names: set[str], to: str
) -> None:
    _, source = made(tmp_path, model_type, overrides)
    if to == "torchtitan-llama3" and SCALED.items() <= overrides.items():
        names = names - {"rope_scaling"}  # stretched as Llama 3.1 is
    assert {fault.key for fault in check(source, to=to).refused} == names


@pytest.mark.parametrize("to", ["hf-helium", "hf-internlm3", "hf-arcee", "hf-glm4", "hf-cohere"])
def test_a_llama_lacks_what_every_model_of_some_classes_has(tmp_path: Path, to: str) -> None:
    source = save_hf(tiny("llama", attention_bias=True), tmp_path / "hf")
    with pytest.raises(NotExpressibleError):
        convert(source, tmp_path / "out", form="hf", to=to)
