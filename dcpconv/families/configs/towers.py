"""Classes of transformers with a tower beside a language model, by ``model_type``.

What they say of the language model, in ``text_config`` or, in older files, outside, is read as the
class of the language model reads it.  Positions of text are alike in every dimension that RoPE may
have, so that a language model alone computes what it computes beside its tower.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcpconv.families.configs.model_type import SIGMOID, ModelType, Routing


def _beside_a_tower(
    class_name: str,
    defaults: Mapping[str, object],
    language: str = "",
    routing: Routing | None = None,
) -> ModelType:
    return ModelType(
        class_name,
        {"tie_word_embeddings": False, **defaults},
        routing=routing,
        expresses=frozenset(),
        is_copied=True,
        language=language,
    )


_QWEN2: dict[str, object] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_window_layers": 80,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
_QWEN3: dict[str, object] = {
    "max_position_embeddings": 128_000,
    "rope_theta": 500_000.0,
    "sliding_window": None,
}
_TIED: dict[str, object] = {"tie_word_embeddings": True}

TOWERS: Mapping[str, ModelType] = {
    "qwen2_vl": _beside_a_tower("Qwen2VLForConditionalGeneration", _QWEN2, "qwen2"),
    "qwen2_5_vl": _beside_a_tower("Qwen2_5_VLForConditionalGeneration", _QWEN2, "qwen2"),
    "qwen3_vl": _beside_a_tower("Qwen3VLForConditionalGeneration", _QWEN3, "qwen3"),
    "qwen3_vl_moe": _beside_a_tower(
        "Qwen3VLMoeForConditionalGeneration",
        _QWEN3
        | {
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
        },
        "qwen3_moe",
        Routing(norm_topk=True, dense="any"),  # whatever its file says
    ),
    "gemma3": _beside_a_tower("Gemma3ForConditionalGeneration", _TIED, "gemma3_text"),
    "gemma4": _beside_a_tower("Gemma4ForConditionalGeneration", _TIED, "gemma4_text"),
    "kimi_k25": _beside_a_tower("Kimi_K25ForConditionalGeneration", _TIED, "deepseek_v3", SIGMOID),
    "llama4": _beside_a_tower("Llama4ForConditionalGeneration", {}, "llama4_text"),
    "mistral3": _beside_a_tower("Mistral3ForConditionalGeneration", _TIED),
    "internvl": _beside_a_tower("InternVLForConditionalGeneration", _TIED),
    "llava": _beside_a_tower("LlavaForConditionalGeneration", {}),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""
