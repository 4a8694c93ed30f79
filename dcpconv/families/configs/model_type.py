"""What a class of transformers fills in, fixes and can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Routing:
    """How a class chooses and weighs experts, and in which layers it has them.

    Attributes:
        scoring: What turns router logits into weights.
        selection_bias: Whether a stored bias takes part in choosing.
        norm_topk: Whether the weights of the chosen experts sum to one; ``None`` where the config
            says so.
        groups: Whether groups of experts may compete first.
        scaled: Whether what the routed experts add may have a factor.
        shared: Whether it has no shared experts, some of any width, or some whose summed width is a
            multiple of a routed one's.
        shared_gate: Whether every token weighs what the shared experts add.
        bias: Whether the router and the projections of routed experts have biases.
        dense: Whether layers without experts are none, the first ones, any, or those between a
            stride.
    """

    scoring: str = "softmax"
    selection_bias: bool = False
    norm_topk: bool | None = None
    groups: bool = False
    scaled: bool = False
    shared: Literal["none", "any", "whole"] = "none"
    shared_gate: bool = False
    bias: bool = False
    dense: Literal["none", "first", "any", "strided"] = "none"

    @property
    def fixed(self) -> Mapping[str, object]:
        """``Experts`` fields that the class's code fixes and no file states."""
        stated = {
            "scoring": self.scoring,
            "selection_bias": self.selection_bias,
            "shared_gate": self.shared_gate,
            "bias": self.bias,
        }
        return stated if self.norm_topk is None else {**stated, "norm_topk": self.norm_topk}


SIGMOID = Routing(
    "sigmoid", selection_bias=True, groups=True, scaled=True, shared="whole", dense="first"
)
"""As in DeepSeek-V3."""


@dataclass(frozen=True, slots=True)
class ModelType:
    """One class of transformers.

    Attributes:
        class_name: What ``architectures`` lists.
        defaults: Value of each config.json field that is left out.  Sizes are never left out:
            transformers writes every field that only the class knows.
        implied: ``ModelSpec`` fields that the class's code fixes and no file states.
        routing: What becomes of experts; ``None`` where it has none.
        expresses: Features that the class can hold, by name, or ``None`` where we write no
            config.json for it.
        requires: Features that a model of the class always has.
        allows: Values with which a field is harmless that otherwise nobody here knows.
        language: Class of the language model of a class with a tower; empty where the file says
            which that is, and ``None`` where there is no tower.
        is_copied: Whether config.json is written as it was read, and for models of the class alone.
        takes: Classes whose models it holds all the same -> what its file says otherwise than
            theirs; ``None`` for fields that it does not have.
        assumes: Fields that the class does not look at, and what they have to say all the same.
        spellings: Field of its file -> what the others call it.
        older: The same for fields that are read and no longer written.
        heeds: What the others call a field that the class understands beside its own spelling.
        silent: Fields of the others that the class does not look at.
        ffn_times: Width of the feed-forward block in hidden sizes, where the file states none.
        completes: Makes up fields from others, as the class does.
        stands_in: What the others' fields would be, where the class says the same by its own; no
            file that is written has them.
    """

    class_name: str
    defaults: Mapping[str, object]
    implied: Mapping[str, object] = field(default_factory=dict)
    routing: Routing | None = None
    expresses: frozenset[str] | None = None
    requires: frozenset[str] = frozenset()
    allows: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    assumes: Mapping[str, object] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)
    heeds: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    ffn_times: int | None = None
    language: str | None = None
    is_copied: bool = False
    takes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    completes: Callable[[Mapping[str, object]], Mapping[str, object]] | None = None
    stands_in: Callable[[Mapping[str, object]], Mapping[str, object]] | None = None

    @property
    def experts(self) -> Mapping[str, object]:
        """``Experts`` fields that the class's code fixes and no file states."""
        return self.routing.fixed if self.routing else {}

    def read(self, fields: Mapping[str, object]) -> dict[str, object]:
        """The fields of a file under the names that the others have for them."""
        names = {**self.older, **self.spellings}
        unseen = self.silent | (frozenset(self.spellings.values()) - self.heeds)
        found = {n: value for n, value in fields.items() if n not in names and n not in unseen}
        found |= {
            names[name]: value
            for name, value in fields.items()
            if name in names and value is not None
        }
        hidden = found.get("hidden_size")
        if self.ffn_times is not None and isinstance(hidden, int):
            found.setdefault("intermediate_size", self.ffn_times * hidden)
        return found

    def written(self, fields: Mapping[str, object]) -> dict[str, object]:
        """Fields as its file has them, in the same order."""
        own = {name: spelling for spelling, name in self.spellings.items()}
        return {own.get(n, n): value for n, value in fields.items() if n not in self.silent}


_WITH_LOGITS: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ENDINGS: Final = {
    "score": "ForSequenceClassification",
    "score_bias": "ForTokenClassification",
    "spans": "ForQuestionAnswering",
    "none": "Model",
}
"""``ModelSpec.head`` -> how the name of the class ends.

Source: ``modeling_layers.py`` of transformers 5.23.0, ``GenericForSequenceClassification`` (no
bias), ``GenericForTokenClassification`` and ``GenericForQuestionAnswering`` (with one)."""

_OF_TEXTS: Final = frozenset({"deepseek_v2", "gemma3_text", "hunyuan_v1_moe", "olmo2", "phimoe"})
"""Classes that have a relative with scores of a whole text, and none with scores of every token."""

_SCORING: Final = frozenset(
    {
        *("arcee", "bloom", "deepseek_v3", "exaone4", "falcon", "gemma", "gemma2", "glm", "glm4"),
        *("gpt2", "gpt_neox", "gpt_oss", "helium", "internlm3", "llama", "ministral3", "mistral"),
        *("mixtral", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss"),
        *("smollm3", "stablelm", "starcoder2"),
    }
)
"""Classes that have both relatives with scores."""

_ANSWERING: Final[Mapping[str, str]] = {
    **dict.fromkeys(("arcee", "exaone4", "internlm3", "llama"), "transformer."),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3"), "transformer."),
    **dict.fromkeys(("ministral3", "mistral", "mixtral", "qwen2_moe"), "model."),
    **dict.fromkeys(("bloom", "falcon", "gpt2"), "transformer."),
    "gpt_neox": "gpt_neox.",
}
"""Classes that have a relative for question answering -> what stands before its base model.

Source: ``base_model_prefix`` of each, same version."""

_WITHOUT_BASE: Final = frozenset({"gemma4_text", "llama4", "llama4_text"})
"""Classes whose base model is called by another stem, or that have none."""

_USUAL_CLASSES: Final = 2
"""Source: ``num_labels`` of ``configuration_utils.py``, same version."""


def heads_of(model_type: str) -> frozenset[str]:
    """Features of the heads that a class has relatives with."""
    has_scores = model_type in _SCORING
    return frozenset(
        name
        for name, has in (
            ("score", has_scores or model_type in _OF_TEXTS),
            ("score_bias", has_scores),
            ("spans", model_type in _ANSWERING),
            ("no_head", model_type not in _WITHOUT_BASE),
        )
        if has
    )


def base_of(model_type: str, head: str) -> str | None:
    """What stands before the base model of a class with this head, or ``None`` for what its table
    says."""
    return "" if head == "none" else _ANSWERING.get(model_type) if head == "spans" else None


def head_of(classes: Sequence[str], *known: ModelType | None) -> str:
    """``ModelSpec.head`` of the class that is listed first; another one's is ``lm``.

    Args:
        classes: What ``architectures`` lists.
        known: Classes of which it may be a relative.
    """
    first = classes[0] if classes else ""
    relatives = {
        _stem(one) + ending: head for one in known if one for head, ending in _ENDINGS.items()
    }
    return relatives.get(first, "lm")


def classes_of(fields: Mapping[str, object]) -> int:
    """How many classes scores tell apart."""
    labels, count = fields.get("id2label"), fields.get("num_labels")
    if isinstance(labels, Mapping):
        return max(1, len(labels))
    return count if isinstance(count, int) and count > 0 else _USUAL_CLASSES


def class_name(known: ModelType, head: str) -> str:
    """What ``architectures`` lists for a model with this head."""
    return _stem(known) + _ENDINGS[head] if head in _ENDINGS else known.class_name


def _stem(known: ModelType) -> str:
    ending = next((e for e in _WITH_LOGITS if known.class_name.endswith(e)), "")
    return known.class_name.removesuffix(ending)


def label_fields(n_classes: int | None) -> dict[str, object]:
    """The fields that say how many classes there are, as transformers numbers them."""
    if n_classes is None:
        return {}
    names = {n: f"LABEL_{n}" for n in range(n_classes)}
    return {
        "id2label": {str(n): name for n, name in names.items()},
        "label2id": {name: n for n, name in names.items()},
    }


ANY = frozenset({"rope_scaling", "activation"})
BIASES = frozenset({"qkv_bias", "o_bias"})
WINDOWS = frozenset({"sliding_window", "layer_types"})
EXPERTS = frozenset({"experts"})
QK_NORM = frozenset({"qk_norm"})
LATENT = frozenset({"latent_attention"})

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
