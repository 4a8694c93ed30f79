"""Every field of every family's parameter file is used, harmless, or refuses another naming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dcpconv import convert
from dcpconv.core.errors import NotExpressibleError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from support.models.hf_models import save_hf, tiny

SIZES: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 16,
    "ffn_size": 152,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_seq_len": 64,
    "tied": True,
}
GLM = {"architecture": "glm", "partial_rotary_factor": 0.5, "qkv_bias": True}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "lingua": {},
    "meta": {},
    "minimind1": {},
    "minimind2": {},
    "minimind3": {},
    "minimind4": {"qk_norm": True},
    "chatglm3": GLM,
    "chatglm3-mha": {**GLM, "n_kv_heads": 6},
}


def written(family: str) -> dict[str, Any]:
    return configs.write_config(family, ModelSpec(**{**SIZES, **FAMILIES[family]}))


def unaccounted(directory: Path, fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    file = directory / name
    file.write_text(json.dumps(fields))
    return configs.read_spec(file).unaccounted


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_write_has_no_field_that_we_do_not_know(tmp_path: Path, family: str) -> None:
    name = configs.config_name(family)
    assert name is not None
    assert unaccounted(tmp_path, written(family), name) == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_nobody_knows_is_listed(tmp_path: Path, family: str) -> None:
    name = configs.config_name(family)
    assert name is not None
    fields = written(family)
    place = fields["model"] if family == "lingua" else fields
    place["attn_temperature"] = 0.7
    where = "model." if family == "lingua" else ""
    assert unaccounted(tmp_path, fields, name) == (f"{where}attn_temperature: 0.7",)


LLAMA3 = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-05, "rope_theta": 500000.0,
    "use_scaled_rope": True,
}  # fmt: skip
MISTRAL = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32,
    "n_kv_heads": 8, "norm_eps": 1e-05, "vocab_size": 32768, "rope_theta": 1000000.0,
}  # fmt: skip
MINIMIND2 = {
    "architectures": ["MiniMindLM"],
    "auto_map": {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.MiniMindLM"},
    "aux_loss_alpha": 0.1, "dim": 512, "dropout": 0.0, "flash_attn": True, "hidden_dim": None,
    "max_seq_len": 8192, "model_type": "minimind", "multiple_of": 64, "n_heads": 8,
    "n_kv_heads": 2, "n_layers": 8, "n_routed_experts": 4, "n_shared_experts": True,
    "norm_eps": 1e-05, "norm_topk_prob": True, "num_experts_per_tok": 2, "rope_theta": 1e6,
    "scoring_func": "softmax", "seq_aux": True, "torch_dtype": "float32",
    "transformers_version": "4.44.0", "use_moe": False, "vocab_size": 6400,
}  # fmt: skip
MINIMIND3 = {
    "architectures": ["MiniMindForCausalLM"], "aux_loss_alpha": 0.1, "bos_token_id": 1,
    "dropout": 0.0, "eos_token_id": 2, "flash_attn": True, "hidden_act": "silu",
    "hidden_size": 512, "inference_rope_scaling": False, "intermediate_size": 1408,
    "max_position_embeddings": 32768, "model_type": "minimind", "n_routed_experts": 4,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 8,
    "num_experts_per_tok": 2, "num_hidden_layers": 8, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000.0,
    "scoring_func": "softmax", "seq_aux": True, "torch_dtype": "float16",
    "transformers_version": "4.57.1", "use_cache": True, "use_moe": False, "vocab_size": 6400,
}  # fmt: skip
CHATGLM3 = {
    "_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm",
    "architectures": ["ChatGLMModel"], "auto_map": {}, "add_bias_linear": False,
    "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 13696,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096,
    "kv_channels": 128, "layernorm_epsilon": 1e-05, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28,
    "original_rope": True, "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True,
    "seq_length": 8192, "use_cache": True, "torch_dtype": "float16",
    "transformers_version": "4.30.2", "tie_word_embeddings": False, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip

PUBLISHED = [
    pytest.param("params.json", LLAMA3, id="llama-3.1"),
    pytest.param("params.json", MISTRAL, id="mistral-7b-v0.3"),
    pytest.param("config.json", MINIMIND2, id="minimind2"),
    pytest.param("config.json", MINIMIND3, id="minimind3"),
    pytest.param("config.json", CHATGLM3, id="chatglm3-6b"),
]


@pytest.mark.parametrize(("name", "fields"), PUBLISHED)
def test_published_files_are_accounted_for(
    tmp_path: Path, name: str, fields: Mapping[str, Any]
) -> None:
    assert unaccounted(tmp_path, fields, name) == ()


OTHERS = [
    pytest.param("params.json", LLAMA3, "quantization_args", {"scheme": "int8"}, id="spinquant"),
    pytest.param("params.json", LLAMA3, "lora_args", {"rank": 16, "scale": 2.0}, id="qlora"),
    pytest.param("params.json", LLAMA3, "vision_chunk_size", 448, id="llama-3.2-vision"),
    pytest.param("params.json", MISTRAL, "moe", {"num_experts": 8}, id="mixtral"),
    pytest.param("params.json", MISTRAL, "yarn", {"factor": 4}, id="ministral"),
    pytest.param("params.json", MISTRAL, "tied_embeddings", True, id="tied"),
    pytest.param("config.json", MINIMIND2, "scoring_func", "sigmoid", id="minimind-sigmoid"),
    pytest.param("config.json", CHATGLM3, "quantization_bit", 4, id="chatglm-int4"),
    pytest.param("config.json", CHATGLM3, "original_rope", False, id="chatglm-other-rope"),
]


@pytest.mark.parametrize(("name", "fields", "field", "value"), OTHERS)
def test_what_makes_another_model_is_listed(
    tmp_path: Path, name: str, fields: Mapping[str, Any], field: str, value: object
) -> None:
    (told,) = unaccounted(tmp_path, {**fields, field: value}, name)
    assert told.startswith(f"{field}: ")


@pytest.mark.parametrize("family", ["lingua", "meta", "minimind3"])
def test_a_field_that_nobody_knows_refuses_another_naming_and_no_copy(
    tmp_path: Path, family: str
) -> None:
    source = tmp_path / "in"
    model = tiny("llama", tie_word_embeddings=True)
    convert(save_hf(model, tmp_path / "hf"), source, form="dcp", to=family)
    file = source / str(configs.config_name(family))
    fields = json.loads(file.read_text())
    place = fields["model"] if family == "lingua" else fields
    place["no_rope_layers"] = [0, 1]
    file.write_text(json.dumps(fields))
    name = "config.model.no_rope_layers" if family == "lingua" else "config.no_rope_layers"
    with pytest.raises(NotExpressibleError, match=name.replace(".", r"\.")):
        convert(source, tmp_path / "back", form="hf")
    assert not (tmp_path / "back").exists()
    convert(source, tmp_path / "copy", form="dcp", chunks=2)
    convert(source, tmp_path / "back", form="hf", allow=[name])
