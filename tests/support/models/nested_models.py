"""Tiny Hugging Face models that ``AutoModelForCausalLM`` does not make: with layers of several
kinds, or with a tower beside the language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from support.models.hf_models import GEMMA4_BY_KIND, MODEL_TYPES
from support.models.layers import randomise
from support.models.state_space_cases import STATE_SPACES

TEXT: Mapping[str, object] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 152,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What the language models have in common; their own sizes are odd too."""

MOON: Mapping[str, object] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 4,
    "pos_emb_height": 5,
    "pos_emb_width": 5,
}
"""The tower of Kimi K2.5 and Muse Glimmer."""

LINEAR: Mapping[str, object] = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
ROUTED: Mapping[str, object] = {
    "moe_intermediate_size": 52,
    "shared_expert_intermediate_size": 44,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
QWEN_VISION: Mapping[str, object] = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 96,
    "num_position_embeddings": 16,
}


SIGLIP: Mapping[str, object] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
QWEN: Mapping[str, object] = {"vision_config": QWEN_VISION}
_NONE_SHARED = {n: v for n, v in ROUTED.items() if n != "shared_expert_intermediate_size"}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
_WITHOUT_HEAD_DIM = {name: value for name, value in TEXT.items() if name != "head_dim"}
NESTED: Mapping[str, tuple[str, Mapping[str, object], Mapping[str, object]]] = {
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", {**TEXT, **LINEAR}, QWEN),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", {**TEXT, **LINEAR}, {}),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {**TEXT, **LINEAR, **ROUTED},
        QWEN,
    ),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", {**TEXT, **LINEAR, **ROUTED}, {}),
    "muse_glimmer": (
        "MuseGlimmerForConditionalGeneration",
        {**TEXT, "sliding_window": 8, "num_hidden_layers": 11},
        {
            "vision_config": {**MOON},
            "out_hidden_size": 192,
            "projector_hidden_size": 40,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {**_WITHOUT_HEAD_DIM, **_MROPE},
        {"vision_config": {**QWEN_VISION, "embed_dim": 24, "hidden_size": 96}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {**_WITHOUT_HEAD_DIM, **_MROPE},
        {"vision_config": {**QWEN_VISION, "fullatt_block_indexes": [1]}},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {**TEXT, **_MROPE},
        {"vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]}},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {**TEXT, **_NONE_SHARED, **_MROPE},
        {"vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]}},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {**TEXT, "sliding_window": 8, "query_pre_attn_scalar": 16, "pad_token_id": 0},
        {"vision_config": SIGLIP, "mm_tokens_per_image": 4},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {**TEXT, "sliding_window": 8, "query_pre_attn_scalar": 16, "pad_token_id": 0},
        {},
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            **TEXT,
            **GEMMA4_BY_KIND,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {
            "vision_config": {
                **{n: v for n, v in SIGLIP.items() if n not in {"image_size", "num_channels"}},
                "num_key_value_heads": 2,
                "head_dim": 12,
                "position_embedding_size": 16,
            },
            "audio_config": {
                "hidden_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "subsampling_conv_channels": [4, 2],
                "output_proj_dims": 20,
            },
        },
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            **TEXT,
            "rms_norm_eps": 1e-5,
            "intermediate_size": 52,
            "intermediate_size_mlp": 152,
            "num_local_experts": 5,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8,
            "floor_scale": 4,
        },
        {
            "vision_config": {
                **SIGLIP,
                "intermediate_size": 96,
                "vision_output_dim": 20,
                "projector_input_dim": 20,
                "projector_output_dim": 20,
            },
        },
    ),
    "kimi_k25": (
        "Kimi_K25ForConditionalGeneration",
        {
            **_WITHOUT_HEAD_DIM,
            **MODEL_TYPES["deepseek_v3"],
            "model_type": "deepseek_v3",
            "topk_method": "noaux_tc",
        },
        {
            "vision_config": {**MOON},
            "projection_hidden_size": 48,
            "tie_word_embeddings": False,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {**TEXT, "model_type": "mistral", "sliding_window": None},
        {"vision_config": {**SIGLIP, "model_type": "pixtral", "head_dim": 12}},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {**_WITHOUT_HEAD_DIM, "model_type": "qwen2"},
        {"vision_config": {**SIGLIP, "image_size": [16, 16], "patch_size": [4, 4]}},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {**TEXT, "model_type": "llama"},
        {"vision_config": {**SIGLIP, "model_type": "clip_vision_model"}},
    ),
    "qwen3_next": ("Qwen3NextForCausalLM", {**TEXT, **LINEAR, **ROUTED}, {}),
    **{name: (class_name, fields, {}) for name, (class_name, fields) in STATE_SPACES.items()},
}
"""``model_type`` -> class, fields of its language model, fields of its towers."""


def small(model_type: str, /, *, seed: int = 0, **overrides: object) -> Any:
    """The model of this type in ``NESTED``, with other fields of its language model."""
    class_name, text, towers = NESTED[model_type]
    outside = {k: v for k, v in overrides.items() if k == "tie_word_embeddings" and towers}
    return nested(class_name, model_type, {**text, **overrides}, seed=seed, **{**towers, **outside})


def nested(
    class_name: str,
    model_type: str,
    text: Mapping[str, object],
    *,
    seed: int = 0,
    **towers: object,
) -> Any:
    """A model in eval mode, every stored tensor random.

    Args:
        class_name: Of transformers.
        model_type: As in ``config.json``.
        text: Fields of the language model; with towers they are nested in ``text_config``.
        seed: Decides the values.
        **towers: Further fields of the config, such as ``vision_config``.
    """
    parts = {name: dict(v) if isinstance(v, Mapping) else v for name, v in towers.items()}
    fields = {"text_config": dict(text), **parts} if towers else dict(text)
    config = CONFIG_MAPPING[model_type](**fields)
    with torch.random.fork_rng():
        model = getattr(transformers, class_name)._from_config(config, attn_implementation="eager")
    return randomise(model, seed).to(torch.float32)
