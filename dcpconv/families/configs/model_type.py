"""What a class of transformers fills in, fixes and can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelType:
    """One class of transformers.

    Attributes:
        class_name: What ``architectures`` lists.
        defaults: Value of each config.json field that is left out.  Sizes are never left out:
            transformers writes every field that only the class knows.
        implied: ``ModelSpec`` fields that the class's code fixes and no file states.
        experts: ``Experts`` fields that the class's code fixes and no file states.
        expresses: Features that the class can hold, by name, or ``None`` where we write no
            config.json for it.
        requires: Features that a model of the class always has.
    """

    class_name: str
    defaults: Mapping[str, object]
    implied: Mapping[str, object] = field(default_factory=dict)
    experts: Mapping[str, object] = field(default_factory=dict)
    expresses: frozenset[str] | None = None
    requires: frozenset[str] = frozenset()


ANY = frozenset({"rope_scaling", "activation"})
BIASES = frozenset({"qkv_bias", "o_bias"})
WINDOWS = frozenset({"sliding_window", "layer_types"})
EXPERTS = frozenset({"experts"})
QK_NORM = frozenset({"qk_norm"})

LLAMA: dict[str, object] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, object] = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "rope_theta": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GLM: dict[str, object] = {
    "tie_word_embeddings": False,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
    "max_position_embeddings": 131_072,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "eos_token_id": [151_329, 151_336, 151_338],
    "pad_token_id": 151_329,
}
