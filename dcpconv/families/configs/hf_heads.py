"""What stands behind the last layer, by the class that a config.json lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from dcpconv.families.configs.model_type import ModelType

_CAUSAL = "ForCausalLM"
_ENDINGS: Final = {
    "score": "ForSequenceClassification",
    "score_bias": "ForTokenClassification",
    "none": "Model",
}
"""``ModelSpec.head`` -> how the name of the class ends.

Source: ``modeling_layers.py`` of transformers 5.23.0, ``GenericForSequenceClassification`` (no
bias) and ``GenericForTokenClassification`` (with one)."""

SCORING: Final = frozenset(
    {
        *("arcee", "deepseek_v3", "exaone4", "gemma", "gemma2", "glm", "glm4", "helium"),
        *("internlm3", "llama", "ministral3", "mistral", "mixtral", "phi3", "qwen2", "qwen3"),
        *("qwen2_moe", "qwen3_moe", "seed_oss", "smollm3"),
    }
)
"""Classes that have both relatives with scores."""

HEADS: Final = frozenset({"score", "score_bias", "no_head"})
"""Features that such a class can hold."""

_USUAL_CLASSES: Final = 2
"""Source: ``num_labels`` of ``configuration_utils.py``, same version."""


def head_of(classes: Sequence[str], known: ModelType | None) -> str:
    """``ModelSpec.head`` of the class that is listed first; another one's is ``lm``."""
    stem = known.class_name.removesuffix(_CAUSAL) if known is not None else None
    first = classes[0] if classes else ""
    return next((head for head, ending in _ENDINGS.items() if first == f"{stem}{ending}"), "lm")


def classes_of(fields: Mapping[str, object]) -> int:
    """How many classes scores tell apart."""
    labels, count = fields.get("id2label"), fields.get("num_labels")
    if isinstance(labels, Mapping):
        return max(1, len(labels))
    return count if isinstance(count, int) and count > 0 else _USUAL_CLASSES


def class_name(known: ModelType, head: str) -> str:
    """What ``architectures`` lists for a model with this head."""
    stem = known.class_name.removesuffix(_CAUSAL)
    return stem + _ENDINGS[head] if head in _ENDINGS else known.class_name


def label_fields(n_classes: int | None) -> dict[str, object]:
    """The fields that say how many classes there are, as transformers numbers them."""
    if n_classes is None:
        return {}
    names = {n: f"LABEL_{n}" for n in range(n_classes)}
    return {
        "id2label": {str(n): name for n, name in names.items()},
        "label2id": {name: n for n, name in names.items()},
    }
