"""Classes of transformers with a tower beside a language model, by ``model_type``.

What they say of the language model, in ``text_config`` or, in older files, outside, is read as the
class of the language model reads it.  Positions of text are alike in every dimension that RoPE may
have, so that a language model alone computes what it computes beside its tower.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcpconv.families.configs.model_type import ModelType, Routing


def _beside_a_tower(
    class_name: str, language: str = "", routing: Routing | None = None
) -> ModelType:
    return ModelType(
        class_name,
        {},
        routing=routing,
        expresses=frozenset(),
        is_copied=True,
        language=language,
    )


TOWERS: Mapping[str, ModelType] = {
    "qwen2_vl": _beside_a_tower("Qwen2VLForConditionalGeneration", "qwen2"),
    "qwen2_5_vl": _beside_a_tower("Qwen2_5_VLForConditionalGeneration", "qwen2"),
    "qwen3_vl": _beside_a_tower("Qwen3VLForConditionalGeneration", "qwen3"),
    "qwen3_vl_moe": _beside_a_tower(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_moe",
        Routing(norm_topk=True, dense="any"),  # whatever its file says
    ),
    "mistral3": _beside_a_tower("Mistral3ForConditionalGeneration"),
    "internvl": _beside_a_tower("InternVLForConditionalGeneration"),
    "llava": _beside_a_tower("LlavaForConditionalGeneration"),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""
