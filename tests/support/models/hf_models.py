"""Tiny Hugging Face models with random weights, one per ``model_type``.

Sizes are odd on purpose: 3 layers, 6 heads over 2 kv heads, head_dim 16, vocab 131, so that a
swapped axis cannot hide; head_dim is above 4, where relabelling RoPE would be its own inverse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from support.models.layers import randomise
from support.versions import require_class

SIZES: Mapping[str, object] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 152,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROUTED: Mapping[str, object] = {
    "moe_intermediate_size": 52,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
}
_LATENT: Mapping[str, object] = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
}
_INDEXER: Mapping[str, object] = {"index_topk": 8, "index_n_heads": 4, "index_head_dim": 18}
_GROUPS: Mapping[str, object] = {"n_group": 2, "topk_group": 1}
_NEXT = {"num_nextn_predict_layers": 0}

IN_TURN: Mapping[str, Any] = {
    "use_parallel_residual": False,
    "num_key_value_heads": 6,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0},
}
"""A GPT-NeoX that other classes can hold: its blocks one after the other, all channels turned."""

ONE_KV_HEAD: Mapping[str, Any] = {"num_key_value_heads": 1}

GEMMA4_BY_KIND: Mapping[str, object] = {
    "global_head_dim": 24,
    "num_global_key_value_heads": 3,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 137,
    "hidden_size_per_layer_input": 7,
    "num_experts": 5,
    "top_k_experts": 2,
    "moe_intermediate_size": 52,
    "pad_token_id": 0,
}

MODEL_TYPES: Mapping[str, Mapping[str, object]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 52,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "mixtral": {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2},
    "phi3": {},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "rms_norm_eps": 1e-6,
    },
    "olmo2": {},
    "glm": {"head_dim": 16},
    "ernie4_5_moe": {
        "tie_word_embeddings": False,
        "moe_intermediate_size": 52,
        "moe_k": 2,
        "moe_num_experts": 5,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "granitemoeshared": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 52,
        "attention_multiplier": 0.25,
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_theta": 15e4,
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "deepseek_v3": {
        "num_key_value_heads": 6,
        "moe_intermediate_size": 52,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 20,
        "q_lora_rank": 28,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 14,
        "num_nextn_predict_layers": 0,
    },
    "phi": {"num_key_value_heads": 2, "hidden_act": "gelu"},
    "starcoder2": {"tie_word_embeddings": False},
    "gpt_neox": {"num_key_value_heads": 6},
    "stablelm": {},
    "falcon": {"ffn_hidden_size": 152, "tie_word_embeddings": False},
    "gpt2": {"n_inner": 152, "tie_word_embeddings": False, "num_key_value_heads": 6},
    "bloom": {"intermediate_size": 384, "tie_word_embeddings": False, "num_key_value_heads": 6},
    "smollm3": {"no_rope_layers": [1] * 16, "tie_word_embeddings": False},
    "ernie4_5": {"head_dim": 16, "tie_word_embeddings": False},
    "helium": {"head_dim": 16},
    "internlm3": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "cwm": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.0,
            "original_max_position_embeddings": 64,
        },
    },
    "arcee": {"head_dim": 16},
    "exaone4": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "glm4": {"head_dim": 16},
    "granite": {"attention_multiplier": 0.25},
    "cohere": {"tie_word_embeddings": False},
    "gemma": {"head_dim": 16},
    "qwen2_moe": {
        "moe_intermediate_size": 52,
        "shared_expert_intermediate_size": 60,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 5, "num_experts_per_tok": 2},
    "granitemoe": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.25,
    },
    "dots1": {**_ROUTED, **_GROUPS, "first_k_dense_replace": 1, "sliding_window": None},
    "glm4_moe": {**_ROUTED, **_GROUPS, **_NEXT, "head_dim": 16, "use_qk_norm": True},
    "solar_open": {**_ROUTED, **_GROUPS, "head_dim": 16},
    "exaone_moe": {
        **_GROUPS,
        "moe_intermediate_size": 52,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "hy_v3": {
        "head_dim": 16,
        "moe_intermediate_size": 52,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "minimax_m2": {
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "deepseek_v2": {**_ROUTED, **_LATENT, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_ROUTED, **_LATENT, **_GROUPS},
    "mellum": {
        "head_dim": 16,
        "moe_intermediate_size": 52,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    "deepseek_v32": {**_ROUTED, **_LATENT, **_GROUPS, **_INDEXER, "first_k_dense_replace": 1},
    "glm_moe_dsa": {
        **_ROUTED,
        **_LATENT,
        **_INDEXER,
        "first_k_dense_replace": 1,
        "indexer_types": ["full", "shared", "full"],
    },
    "afmoe": {
        "head_dim": 16,
        "moe_intermediate_size": 52,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "global_attn_every_n_layers": 2,
        "route_scale": 1.5,
    },
    "llama4_text": {
        "head_dim": 16,
        "intermediate_size": 52,
        "intermediate_size_mlp": 152,
        "num_local_experts": 5,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 8,
        "floor_scale": 4,
    },
    "phimoe": {"num_local_experts": 5},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 5, "moe_topk": 2},
    "gemma4_text": {
        **GEMMA4_BY_KIND,
        "head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "mimo_v2_flash": {
        **_ROUTED,
        **_GROUPS,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "v_head_dim": 10,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 8,
    },
    "longcat_flash": {
        **_LATENT,
        "num_hidden_layers": 6,
        "num_layers": 3,
        "head_dim": 8,
        "ffn_hidden_size": 152,
        "expert_ffn_hidden_size": 52,
        "n_routed_experts": 5,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "laguna": {
        "head_dim": 16,
        "num_attention_heads_per_layer": [6, 4, 6],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
        "moe_intermediate_size": 52,
        "shared_expert_intermediate_size": 60,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_routed_scaling_factor": 1.5,
    },
    "cohere2_moe": {
        "head_dim": 16,
        "intermediate_size": 52,
        "prefix_dense_intermediate_size": 152,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "first_k_dense_replace": 1,
        "rms_norm_eps": None,
        "tie_word_embeddings": False,
    },
}
"""What each ``model_type`` adds to ``SIZES``; its ``head_dim`` is 16 where the config has one."""


def tiny(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> Any:
    """A model of ``model_type`` in eval mode, every stored tensor random, norms and biases too.

    Args:
        model_type: As in ``config.json``; a key of ``MODEL_TYPES``.
        seed: Decides the values.
        dtype: Of all parameters.
        **overrides: Fields of the config, e.g. ``tie_word_embeddings=True``.
    """
    fields = {**SIZES, **MODEL_TYPES[model_type], **overrides}
    if model_type == "cwm":  # its own default is a window in three of four layers
        fields.setdefault("layer_types", ["full_attention"] * int(str(fields["num_hidden_layers"])))
    require_class(model_type)
    config = CONFIG_MAPPING[model_type](**fields)
    # Eager attention is the one implementation that every one of these models has.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomise(model, seed).to(dtype)


def save_hf(
    model: Any,
    directory: Path,
    *,
    max_shard_size: str | int | None = None,
    config_style: Literal["4", "5"] = "5",
) -> Path:
    """``save_pretrained`` into ``directory``; returns it.

    Args:
        model: From ``tiny()``.
        directory: Made if absent.
        max_shard_size: Largest shard file, such as ``"100KB"``; one file without it.
        config_style: Rewrite ``config.json`` as transformers 4 spells it, or leave it.
    """
    logging.disable_progress_bar()
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(directory, **options)
    if config_style == "4":
        path = directory / "config.json"
        path.write_text(json.dumps(_as_version_4(json.loads(path.read_text())), indent=2) + "\n")
    return directory


def _as_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of transformers 4.57: RoPE at the top level, ``torch_dtype``, ``num_experts``."""
    rope = dict(config.pop("rope_parameters", {}))
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    config["transformers_version"] = "4.57.6"
    return config
