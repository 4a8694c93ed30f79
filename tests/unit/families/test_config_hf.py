"""config.json: what transformers itself makes of the same file is what we must make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from dcpconv.core.spec import ModelSpec, RopeScaling
from dcpconv.families.configs import read_spec
from dcpconv.families.configs.model_types import MODEL_TYPES
from support.models.config_files import LLAMA3, SIZES, assert_same_model, save
from support.versions import require_class

TEXTS = {
    name: getattr(config.sub_configs["text_config"], "model_type", "llama")
    for name in MODEL_TYPES
    if name in transformers.CONFIG_MAPPING
    and "text_config" in (config := transformers.CONFIG_MAPPING[name]).sub_configs
}
"""Classes with a language model in ``text_config`` -> the class of that, or one that it may be."""
TEXTS["kimi_k25"] = "deepseek_v3"  # the one that it has


def spec_of(directory: Path, **fields: Any) -> ModelSpec:
    return read_spec(save(directory, {"model_type": "llama"} | SIZES | fields))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_left_out_is_what_the_class_says(tmp_path: Path, model_type: str) -> None:
    require_class(model_type)
    # Head counts must divide for the classes whose default number of kv heads is large.
    many = {"helium": 20, "glm4_moe_lite": 20, "glm_moe_dsa": 64, "deepseek_v32": 128}
    heads = many.get(model_type, 32)
    sizes = SIZES | {"num_attention_heads": heads, "hidden_size": 8 * heads}
    if model_type == "mamba2":  # whose heads have to fill twice the hidden size
        sizes |= {"num_heads": 8}
    if model_type == "deepseek_v2":  # without this the class makes no model
        sizes["num_experts_per_tok"] = 2
    is_nested = model_type in TEXTS
    inner = {"text_config": {**sizes, "model_type": TEXTS.get(model_type)}}
    said = inner if is_nested else sizes
    directory = save(tmp_path, {"model_type": model_type, **said})
    config = transformers.AutoConfig.from_pretrained(directory)
    spec = read_spec(directory)

    inside = config.get_text_config()
    inside.allow_global_per_layer_attribute_access = True
    if hasattr(config, "tie_word_embeddings"):  # which counts where they are nested
        inside.tie_word_embeddings = config.tie_word_embeddings
    text = spec.model_copy(update={"architecture": TEXTS.get(model_type, model_type)})
    assert_same_model(text, inside)
    model = (
        transformers.AutoModelForImageTextToText if is_nested else transformers.AutoModelForCausalLM
    )
    assert MODEL_TYPES[model_type].class_name == model._model_mapping[type(config)].__name__
    config = config.get_text_config()
    if spec.experts is not None:
        counts = ("num_experts", "num_local_experts", "n_routed_experts")
        assert spec.experts.count in {getattr(config, name, None) for name in counts}
        assert spec.experts.per_token == config.num_experts_per_tok
        assert spec.experts.ffn_size == getattr(
            config, "moe_intermediate_size", config.intermediate_size
        )


@pytest.mark.parametrize(
    ("model_type", "slot", "names"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias", "o_bias", "mlp_bias"}),
        ("mistral", {}, set()),
        ("qwen2", {}, {"qkv_bias"}),
        ("qwen3", {}, {"qk_norm"}),
        ("qwen3", {"attention_bias": True}, {"qk_norm", "qkv_bias", "o_bias"}),
        ("glm", {"head_dim": 16, "pad_token_id": 0}, {"qkv_bias"}),
        ("granite", {"attention_multiplier": 0.0625}, set()),
        ("gemma2", {"head_dim": 16}, {"post_norms"}),
        ("gemma2", {"head_dim": 16, "attention_bias": True}, {"post_norms", "qkv_bias", "o_bias"}),
        ("mistral", {"attention_bias": True, "mlp_bias": True, "use_bias": True}, set()),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias"}),
    ],
)
def test_features_are_the_tensors_of_the_real_model(
    tmp_path: Path, model_type: str, slot: dict[str, Any], names: set[str]
) -> None:
    sizes = SIZES | {"num_key_value_heads": 2} | slot
    directory = save(tmp_path, {"model_type": model_type} | sizes)
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config)
    keys = model.state_dict().keys()
    endings = {
        "qkv_bias": "q_proj.bias",
        "o_bias": "o_proj.bias",
        "mlp_bias": "down_proj.bias",
        "qk_norm": "q_norm.weight",
        "post_norms": "pre_feedforward_layernorm.weight",
    }
    shown = {name for name, end in endings.items() if any(key.endswith(end) for key in keys)}

    spec = read_spec(directory)
    assert shown == names
    assert {name for name in spec.features() if name in endings} == names
    multiplier = spec.query_multiplier or spec.head_dim**-0.5
    assert multiplier == model.model.layers[0].self_attn.scaling


FOUR = {
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
    "torch_dtype": "bfloat16",
}
FIVE = {
    "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0},
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("style", [pytest.param(FOUR, id="v4"), pytest.param(FIVE, id="v5")])
def test_both_styles_say_the_same(tmp_path: Path, style: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, **style)
    assert spec.rope_theta == 500000.0
    assert spec.dtype == "bf16"
    assert spec.rope_scaling == RopeScaling(kind="llama3", parameters=LLAMA3)
    assert spec.features() == {"rope_scaling": "llama3, factor 32.0"}
    assert spec.extra == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": RopeScaling(kind="linear", parameters={"factor": 2.0})},
            id="old-name-of-rope_type",
        ),
        pytest.param({"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}, id="none"),
        pytest.param(
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
                "rope_theta": 5.0,
            },
            {
                "rope_theta": 5.0,
                "rope_scaling": RopeScaling(kind="linear", parameters={"factor": 2.0}),
            },
            id="filled-rope_scaling-wins",
        ),
        pytest.param(
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
                    "full_attention": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0},
                    "other": None,
                }
            },
            {
                "rope_theta": 7.0,
                "rope_scaling": RopeScaling(kind="linear", parameters={"factor": 2.0}),
            },
            id="one-rope-per-layer-type",
        ),
        pytest.param({"max_sequence_length": 77}, {"max_seq_len": 77}, id="early-export"),
        pytest.param({"num_key_value_heads": None}, {"n_kv_heads": 6}, id="null-kv-heads"),
        pytest.param({"num_key_value_heads": 2}, {"n_kv_heads": 2}, id="kv-heads"),
        pytest.param({"head_dim": None}, {"head_dim": 16}, id="null-head_dim"),
        pytest.param({"head_dim": 24}, {"head_dim": 24}, id="head_dim"),
        pytest.param({"hidden_act": "swish"}, {"activation": "silu"}, id="swish"),
        pytest.param({"bos_token_id": None}, {"bos_token_id": None}, id="null-is-not-left-out"),
        pytest.param({"eos_token_id": [3, 4]}, {"eos_token_id": (3, 4)}, id="several-eos"),
        pytest.param({"torch_dtype": "auto"}, {"dtype": None}, id="auto-dtype"),
        pytest.param(
            {"model_type": "mistral", "num_key_value_heads": None},
            {"sliding_window": 4096, "n_kv_heads": 6},
            id="mistral-default",
        ),
        pytest.param(
            {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
            {"sliding_window": None, "n_kv_heads": 2},
            id="mistral-null-is-none",
        ),
        pytest.param(
            {"model_type": "qwen2", "num_key_value_heads": 6, "use_sliding_window": True,
             "max_window_layers": 3},
            {"sliding_window": None, "layer_types": None},
            id="qwen2-window-above-all-layers",
        ),
        pytest.param(
            {"model_type": "qwen2", "num_key_value_heads": 6, "use_sliding_window": True,
             "max_window_layers": 1},
            {
                "sliding_window": 4096,
                "layer_types": ("full_attention", "sliding_attention", "sliding_attention"),
            },
            id="qwen2-window-above-one-layer",
        ),
        pytest.param(
            {"model_type": None, "architectures": ["LLaMAForCausalLM"]},
            {"architecture": "llama", "tied": False},
            id="class-only",
        ),
        pytest.param(
            {"model_type": "novel", "max_position_embeddings": 9, "rms_norm_eps": 1e-3},
            {"architecture": "novel", "tied": True, "max_seq_len": 9, "norm_eps": 1e-3},
            id="unknown-type-is-read-generically",
        ),
        pytest.param(
            {"initializer_range": 0.5, "transformers_version": "4.57.6", "_name_or_path": "here"},
            {"extra": {"initializer_range": 0.5}},
            id="the-rest-is-carried-over",
        ),
    ],
)  # fmt: skip
def test_reading(tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, **fields)
    assert {name: getattr(spec, name) for name in expected} == expected
