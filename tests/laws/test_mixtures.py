"""Classes with experts: the same weights under every name they have, and in classes that compute
the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dcpconv import check, convert
from dcpconv.families.configs.mixtures import MIXTURES
from support.checkpoints.families import (
    RIGHT,
    assert_config_says_every_key,
    assert_every_form_holds,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import save_hf, tiny
from support.models.mixture_cases import MIXTURE_CASES

MANY: dict[str, Any] = {"num_hidden_layers": 11}
"""Eleven layers: as text, 10 comes before 2."""


ALL_LAYERS: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"indexer_types": None, "index_topk_freq": 3},
}
"""What is stated of three layers otherwise."""


def experts(model_type: str, count: int) -> dict[str, Any]:
    """That many experts, in the spelling of a class."""
    config = tiny(model_type).config
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    stated = config.to_dict()
    return {next(name for name in names if name in stated): count}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_every_form_and_both_namings_hold_the_same_bits(tmp_path: Path, model_type: str) -> None:
    overrides = {**MANY, **experts(model_type, 12), **ALL_LAYERS.get(model_type, {})}
    model = tiny(model_type, dtype=torch.bfloat16, **overrides)
    assert_every_form_holds(model, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [*(pytest.param(name, {}, id=name) for name in MIXTURES), *MIXTURE_CASES],
)
def test_the_config_alone_says_every_key_and_shape(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model = tiny(model_type, **overrides)
    assert_config_says_every_key(model, model_type, tmp_path)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_check_accounts_for_every_key_and_size(tmp_path: Path, model_type: str) -> None:
    source = save_hf(tiny(model_type), tmp_path / "hf")
    assert check(source, to="hf-memory")
    assert check(source)

    tensors = hf_tensors(source)
    key = next(key for key in tensors if ".experts." in key or "input_linear" in key)
    wide = next(key for key in tensors if "q_proj" in key or "kv_b_proj" in key)
    damaged = {name: tensor for name, tensor in tensors.items() if name != key}
    damaged[wide] = torch.zeros(tensors[wide].shape[0] + 1, *tensors[wide].shape[1:])
    save_file(damaged, source / "model.safetensors", {"format": "pt"})
    coverage = check(source, to="hf-memory")
    assert not coverage
    assert [fault.key for fault in coverage.misshapen] == [wide]
    assert any(key in fault.why for fault in coverage.missing)


WHOLE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
"""Whole heads turn."""
TURNED = {**WHOLE, "partial_rotary_factor": 1.0}
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention"] * 3, "sliding_window": 64}
"""EXAONE turns what slides; a window as long as the sequence hides nothing."""
NEUTRAL = {"attention_multiplier": 0.25}

PAIRS = [
    pytest.param("dots1", {}, "glm4_moe", id="dots1-glm4_moe"),
    pytest.param("dots1", {}, "exaone_moe", id="dots1-exaone_moe"),
    pytest.param("dots1", {"tie_word_embeddings": True}, "glm4_moe", id="dots1-tied"),
    pytest.param("dots1", {"norm_topk_prob": True}, "exaone_moe", id="dots1-summing-to-one"),
    pytest.param("dots1", {"n_shared_experts": 2}, "glm4_moe", id="dots1-two-shared"),
    pytest.param("dots1", {"n_shared_experts": 0}, "glm4_moe", id="dots1-none-shared"),
    pytest.param("dots1", {"hidden_act": "gelu"}, "glm4_moe", id="dots1-gelu"),
    pytest.param(
        "dots1",
        {**MANY, "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 3},
        "exaone_moe",
        id="dots1-eleven-layers-twelve-experts",
    ),
    pytest.param("dots1", {"head_dim": 24}, "glm4_moe", id="dots1-wide-heads"),
    pytest.param(
        "dots1", {"n_group": 1, "norm_topk_prob": True}, "hy_v3", id="dots1-hy_v3-no-groups"
    ),
    pytest.param("hy_v3", {}, "dots1", id="hy_v3-dots1"),
    pytest.param("hy_v3", {"attention_bias": True}, "dots1", id="hy_v3-biased"),
    pytest.param(
        "hy_v3", {**MANY, "num_experts": 12, "head_dim": 24}, "glm4_moe", id="hy_v3-glm4_moe"
    ),
    pytest.param("glm4_moe", TURNED, "dots1", id="glm4_moe-dots1"),
    pytest.param(
        "glm4_moe",
        {**TURNED, "use_qk_norm": False, "first_k_dense_replace": 0},
        "solar_open",
        id="glm4_moe-solar_open",
    ),
    pytest.param("solar_open", {}, "glm4_moe", id="solar_open-glm4_moe"),
    pytest.param("solar_open", {"attention_bias": True}, "glm4_moe", id="solar_open-biased"),
    pytest.param("exaone_moe", SLIDING, "dots1", id="exaone_moe-dots1"),
    pytest.param(
        "exaone_moe",
        {**SLIDING, "first_k_dense_replace": 2, "num_shared_experts": 2},
        "glm4_moe",
        id="exaone_moe-two-dense-two-shared",
    ),
    pytest.param("deepseek_v3", {}, "glm4_moe_lite", id="deepseek_v3-glm4_moe_lite"),
    pytest.param(
        "deepseek_v3",
        {**MANY, "n_routed_experts": 12, "first_k_dense_replace": 3, "q_lora_rank": None},
        "glm4_moe_lite",
        id="deepseek_v3-eleven-layers-direct",
    ),
    pytest.param("glm4_moe_lite", {}, "deepseek_v3", id="glm4_moe_lite-deepseek_v3"),
    pytest.param("glm4_moe_lite", {"attention_bias": True}, "deepseek_v3", id="lite-biased"),
    pytest.param("granitemoe", NEUTRAL, "mixtral", id="granitemoe-mixtral"),
    pytest.param("granitemoe", {}, "granitemoeshared", id="granitemoe-granitemoeshared"),
    pytest.param(
        "granitemoe",
        {
            **MANY,
            "num_local_experts": 12,
            "attention_bias": True,
            "attention_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        "granitemoeshared",
        id="granitemoe-multipliers",
    ),
    pytest.param("mixtral", {}, "granitemoe", id="mixtral-granitemoe"),
    pytest.param("mellum", {}, "qwen3_moe", id="mellum-qwen3_moe"),
    pytest.param(
        "mellum",
        {**MANY, "num_experts": 12, "attention_bias": True, "norm_topk_prob": True},
        "qwen3_moe",
        id="mellum-eleven-layers-twelve-experts",
    ),
    pytest.param(
        "qwen3_moe", {"mlp_only_layers": [1], "head_dim": 24}, "mellum", id="qwen3_moe-mellum"
    ),
]


@pytest.mark.parametrize(("model_type", "overrides", "to"), PAIRS)
def test_another_class_computes_the_same_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], to: str
) -> None:
    model = tiny(model_type, **overrides)
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to=f"hf-{to}")
    convert(source, tmp_path / "other", form="hf", to=f"hf-{to}")
    other = load_hf(tmp_path / "other")
    assert other.config.model_type == to
    assert difference(other, model) < RIGHT

    # What that class holds in memory, straight from the files of this one.
    convert(source, tmp_path / "live.pth", to=_memory(to))
    assert_same(torch_tensors(tmp_path / "live.pth"), dict(other.state_dict()))

    convert(tmp_path / "other", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), model) < RIGHT


def _memory(model_type: str) -> str:
    return f"hf-memory-{model_type}"


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_without_its_indexer_a_model_is_a_deepseek_v3_as_far_as_it_sees_everything(
    tmp_path: Path, model_type: str
) -> None:
    model = tiny(model_type, index_topk=64)
    source = save_hf(model, tmp_path / "hf")
    report = convert(source, tmp_path / "out", form="hf", to="hf-deepseek_v3", allow=["indexer"])
    assert difference(load_hf(tmp_path / "out"), model) < RIGHT
    indexers = {key for key in hf_tensors(source) if ".indexer." in key}
    assert {key for key, _ in report.ignored} == indexers


def test_layers_behind_the_last_are_dropped_with_a_reason(tmp_path: Path) -> None:
    model = tiny("glm4_moe")
    source = save_hf(model, tmp_path / "hf")
    tensors = hf_tensors(source)
    behind = {
        "model.layers.3.eh_proj.weight": torch.zeros(96, 192),
        "model.layers.3.enorm.weight": torch.zeros(96),
        "model.layers.3.hnorm.weight": torch.zeros(96),
        "model.layers.3.shared_head.norm.weight": torch.zeros(96),
        "model.layers.3.shared_head.head.weight": torch.zeros(131, 96),
        "model.layers.3.embed_tokens.weight": torch.zeros(131, 96),
        **{
            key.replace("layers.2.", "layers.3."): tensor.clone()
            for key, tensor in tensors.items()
            if ".layers.2." in key
        },
    }
    save_file({**tensors, **behind}, source / "model.safetensors", {"format": "pt"})
    report = convert(source, tmp_path / "live.pth", to="hf-memory")
    assert_same(torch_tensors(tmp_path / "live.pth"), dict(model.state_dict()))
    assert {key for key, _ in report.ignored} == set(behind)
    assert all("multi-token prediction" in why for _, why in report.ignored)
