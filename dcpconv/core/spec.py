"""What keys cannot say: sizes, and the parts of the arithmetic that no tensor shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Annotated

from dcpconv.core.blocks import (
    SPECIAL,
    Count,
    Experts,
    LatentAttention,
    Positive,
    RopeScaling,
    Size,
)
from dcpconv.core.dtypes import BY_LABEL, dtype_named
from dcpconv.core.record import Json, Record, field

__all__ = [
    "FEATURES",
    "SPECIAL",
    "Count",
    "Declared",
    "Experts",
    "LatentAttention",
    "ModelSpec",
    "Positive",
    "RopeScaling",
    "Size",
]


def _label(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    known = dtype_named(dtype)
    if known is None:
        raise ValueError(f"one of {', '.join(BY_LABEL)} or torch's name for it")
    return known.label


FEATURES = frozenset(
    {
        *("rope_scaling", "partial_rotary", "sliding_window", "layer_types"),
        *("qkv_bias", "o_bias", "mlp_bias", "head_bias", "latent_bias"),
        *("qk_norm", "qk_norm_whole", "norm", "no_pre_norms", "post_norms", "activation"),
        *("attn_softcap", "final_softcap", "query_multiplier", "embedding_multiplier"),
        *("residual_multiplier", "logits_scaling", "experts", "latent_attention"),
        *("no_rope_layers", "qk_norm_heads", "parallel_residual", "ungated"),
        *("sinks", "clamped_glu", "expert_bias"),
        *("score", "score_bias", "spans", "no_head"),
        *("norm_bias", "positions", "embed_norm", "parallel_norms"),
        *("attention_gate", "bare_norms"),
        *SPECIAL,
    }
)
"""Every name that ``ModelSpec.features`` may give."""


@dataclass(frozen=True, slots=True)
class Declared:
    """The declarations of one table.

    Attributes:
        axes: Axis -> rule for its size.
        of_kind: Kind of layer -> axis -> rule, where layers of the kind have another size.
        kinds: Kind -> rules, of which the first counts whose fields are there.
    """

    axes: Mapping[str, str] = dataclass_field(default_factory=dict)
    of_kind: Mapping[str, Mapping[str, str]] = dataclass_field(default_factory=dict)
    kinds: Mapping[str, tuple[str, ...]] = dataclass_field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.axes or self.kinds)


class ModelSpec(Record):
    """A model as its parameter file describes it, in no family's spelling.

    The first block is what a Llama needs.  Every later field is a feature whose default is
    neutral, so that a spec without features is a model any family can hold.

    Attributes:
        architecture: ``model_type`` in transformers: ``llama``, ``mistral``, ``qwen2``, ...
        vocab_size: Rows of the embedding, or ``None`` where only the tensor knows.
        head_dim: Channels of one head; need not be ``hidden_size / n_heads``.
        ffn_size: Width of the feed-forward block.
        max_seq_len: Positions the model was made for, in tokens.
        tied: Whether the output head is the embedding.
        dtype: Label of the element type the file names (``bf16``), or ``None`` where it names none.
            Any of torch's spellings is accepted and becomes the label.
        partial_rotary_factor: Share of each head that RoPE turns.
        sliding_window: Tokens a query sees, itself included, or ``None`` for all before it.
        layer_types: One word per layer where layers differ, or ``None`` where all are alike.
        qkv_bias: Whether the q, k and v projections have biases.
        o_bias: Whether the projection behind attention has a bias.
        mlp_bias: Whether gate, up and down have biases in plain feed-forward blocks and in shared
            experts; routed experts have none.
        head_bias: Whether the output head has a bias, which is its own also where it is tied.
        qk_norm: Whether every head of q and k is normalised before RoPE.
        qk_norm_whole: Whether q and k are normalised over all their heads together (OLMo 2).
        qk_norm_heads: Whether every head of q and k is normalised by weights of its own (Cohere).
        no_rope_layers: Layers in which RoPE turns nothing.
        gated: Whether the feed-forward block has a gate.
        parallel_residual: Whether attention and feed-forward see the same normalised input
            (Cohere).
        parallel_norms: Whether each of them has a norm of its own there (GPT-NeoX).
        norm_bias: Whether norms add a bias, which those of q and k within attention may lack.
        embed_norm: Whether a norm follows the embedding (Bloom).
        bare_norms: Whether norms without weights follow the embedding and stand before RoPE in q
            and k (Muse Glimmer).
        attention_gate: Whether the sigmoid of a projection is a factor on what attention gives.
        positions: What tells positions apart: ``rope``; ``learned``, a vector for each; ``alibi``,
            a slope per head; or ``none``, since other layers know the order.
        norm: ``rmsnorm``; ``rmsnorm_plus_one``, which scales by 1 + weight; or ``layernorm``.
        pre_norms: Whether attention and feed-forward inputs are normalised.
        post_norms: Whether attention and feed-forward outputs are normalised.
        activation: As transformers names it, ``swish`` being ``silu``.
        glu_limit: Bound on gate and up before they are multiplied, up plus one, and ``None`` where
            nothing bounds them (gpt-oss).
        glu_alpha: Factor inside the gate's sigmoid, where there is a bound.
        sinks: Whether every head has a number that takes part in the softmax over the keys and
            adds nothing (gpt-oss).
        query_multiplier: Factor on query-key products; ``None`` for ``head_dim ** -0.5``.
        residual_multiplier: Factor on what each block adds to the residual stream.
        logits_scaling: The logits are divided by it.
        latent: Low-rank attention, or ``None`` for the usual kind.
        qkv_per_head: Whether the rows of a fused q, k, v matrix count heads first (ChatGLM with
            ``multi_query_attention`` off).  It says where tensors lie, not what they do.
        head: What stands behind the last layer: ``lm``, logits of every token; ``score``, scores of
            a whole text, as reward models and classifiers have; ``score_bias``, scores of every
            token; ``spans``, where answers start and end; or ``none``.
        n_classes: What scores tell apart, where the head gives scores.
        special: Features that one class alone has: their stable name, and what a person would say.
        bos_token_id: First token; ``None`` where there is none or no one said.
        origin: ``config`` of the table whose parameter file this was read from, such as ``lingua``
            or ``hf-llama``; empty where it was put together otherwise.
        unsaid: Fields whose value is only a default of ours, since neither a file nor the user says
            it; no parameter file is written from a guess.
        unaccounted: Fields of the parameter file, as ``name: value``, whose meaning nobody knows;
            each refuses a change of naming.
        extra: Fields of an HF config that mean nothing here and are carried over as they are.
        stated: All its fields, from which axes and kinds follow that a table declares.

    >>> from dcpconv.core.spec import ModelSpec
    >>> ModelSpec(
    ...     vocab_size=32, hidden_size=12, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=2,
    ...     ffn_size=20, sliding_window=4, max_seq_len=64,
    ... ).features()
    {'sliding_window': '4 of 64 tokens'}
    """

    architecture: str = "llama"
    vocab_size: Size | None
    hidden_size: Size
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count
    head_dim: Size
    ffn_size: Size
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 10_000.0
    max_seq_len: Size
    tied: bool = False
    dtype: Annotated[str | None, _label] = None

    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: Positive = 1.0
    sliding_window: Size | None = None
    layer_types: tuple[str, ...] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qk_norm_heads: bool = False
    no_rope_layers: tuple[Annotated[int, field(ge=0)], ...] = ()
    gated: bool = True
    parallel_residual: bool = False
    parallel_norms: bool = False
    norm: str = "rmsnorm"
    norm_bias: bool = False
    embed_norm: bool = False
    bare_norms: bool = False
    attention_gate: bool = False
    positions: str = "rope"
    pre_norms: bool = True
    post_norms: bool = False
    activation: str = "silu"
    glu_limit: Positive | None = None
    glu_alpha: Positive = 1.0
    sinks: bool = False
    attn_logit_softcap: Positive | None = None
    final_logit_softcap: Positive | None = None
    query_multiplier: Positive | None = None
    embedding_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0
    experts: Experts | None = None
    latent: LatentAttention | None = None
    qkv_per_head: bool = False
    special: Mapping[str, str] = field(default_factory=dict)

    head: str = "lm"
    n_classes: Count | None = None

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    origin: str = ""
    unsaid: tuple[str, ...] = ()
    unaccounted: tuple[str, ...] = ()
    extra: Mapping[str, Json] = field(default_factory=dict)
    stated: Mapping[str, Json] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same model, in whatever words a file states it."""
        if type(other) is not type(self):
            return NotImplemented
        return {**self.__dict__, "stated": {}} == {**other.__dict__, "stated": {}}

    __hash__ = Record.__hash__

    def agree(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} kv heads evenly")
        if self.layer_types is not None and len(self.layer_types) != self.n_layers:
            raise ValueError(f"{len(self.layer_types)} layer types for {self.n_layers} layers")

    def __str__(self) -> str:
        """What a person asks first, and every feature, in one line."""
        heads = f"{self.n_heads} heads of {self.head_dim} over {self.n_kv_heads}"
        theta = f"theta {self.rope_theta:g}, eps {self.norm_eps:g}"
        sizes = f"{self.n_layers} layers, hidden {self.hidden_size}, {heads}, ffn {self.ffn_size}"
        features = (f"{name} ({text})" for name, text in self.features().items())
        return ", ".join((sizes, theta, *features))

    def axes(self) -> dict[str, int]:
        """Size of every layout axis this model has, by letter; an axis nobody knows is absent."""
        sizes = {
            "d": self.hidden_size,
            "L": self.n_layers,
            "h": self.n_heads,
            "g": self.n_kv_heads,
            "e": self.head_dim,
            "f": self.ffn_size,
            "r": self.n_heads // self.n_kv_heads,
            "t": self.max_seq_len,
        }
        if self.n_classes is not None:
            sizes["k"] = self.n_classes
        if self.vocab_size is not None:
            sizes["V"] = self.vocab_size
        if self.head_dim % 2 == 0:
            sizes |= {"two": 2, "p": self.head_dim // 2}
        if self.experts is not None:
            sizes |= {"E": self.experts.count, "m": self.experts.ffn_size}
            sizes |= {"S": self.experts.shared_count, "s": self.experts.shared_ffn_size or 0}
        if self.latent is not None:
            sizes |= {
                "c": self.latent.kv_rank,
                "n": self.latent.nope_dim,
                "v": self.latent.value_dim,
            }
            if self.latent.q_rank is not None:
                sizes["a"] = self.latent.q_rank
        return sizes

    def has(self, condition: str, layer: int = 0) -> bool:
        """Whether the model has the tensors that a naming table marks with ``condition``.

        Args:
            condition: A name from ``features``; ``tied`` or ``untied``; ``dense``, ``moe`` or
                ``shared_experts``, which depend on the layer; ``q_latent`` or ``q_direct``; several
                of them joined by ``&``; or empty for every model.
            layer: Which layer is asked about.

        >>> from dcpconv.core.spec import ModelSpec
        >>> spec = ModelSpec(
        ...     vocab_size=32, hidden_size=12, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=2,
        ...     ffn_size=20, max_seq_len=64, mlp_bias=True,
        ... )
        >>> spec.has("dense & mlp_bias"), spec.has("moe & mlp_bias")
        (True, False)
        """
        return all(self._has(word.strip(), layer) for word in condition.split("&"))

    def _has(self, condition: str, layer: int) -> bool:
        if condition in {"tied", "untied"}:
            return self.head == "lm" and self.tied == (condition == "tied")
        experts = self.experts
        is_moe = experts is not None and layer not in experts.dense_layers
        if condition in {"dense", "moe"}:
            return is_moe == (condition == "moe")
        if condition == "sequential":
            return not self.parallel_residual
        if condition in {"no_parallel_norms", "no_score_bias"}:
            return not self._has(condition.removeprefix("no_"), layer)
        if condition == "shared_experts":
            return is_moe and experts is not None and experts.shared_count > 0
        if condition in {"q_latent", "q_direct"}:
            latent = self.latent
            return latent is not None and (latent.q_rank is None) == (condition == "q_direct")
        return not condition or condition in self.features()

    def features(self) -> dict[str, str]:
        """Every feature that is not neutral, by its stable name, with what a person would say.

        The names are what ``--allow`` takes.  A window no shorter than the sequence is neutral, as
        is a query factor that equals the usual one.
        """
        window = self.sliding_window
        usual = self.head_dim**-0.5
        kinds = set(self.layer_types or ())
        rows = (
            ("rope_scaling", self.rope_scaling is not None, f"{self.rope_scaling}"),
            (
                "partial_rotary",
                self.partial_rotary_factor != 1.0,
                f"{self.partial_rotary_factor} of each head",
            ),
            (
                "sliding_window",
                window is not None and window < self.max_seq_len,
                f"{window} of {self.max_seq_len} tokens",
            ),
            ("layer_types", len(kinds) > 1, ", ".join(sorted(kinds))),
            ("qkv_bias", self.qkv_bias, "on q, k and v"),
            ("o_bias", self.o_bias, "on the attention output"),
            ("mlp_bias", self.mlp_bias, "on gate, up and down"),
            ("head_bias", self.head_bias and self.head == "lm", "on the logits"),
            ("qk_norm", self.qk_norm, "on q and k"),
            ("qk_norm_whole", self.qk_norm_whole, "on all heads of q and k together"),
            ("qk_norm_heads", self.qk_norm_heads, "on q and k, each head by its own weights"),
            (
                "no_rope_layers",
                bool(self.no_rope_layers),
                f"no RoPE in {len(self.no_rope_layers)} of {self.n_layers} layers",
            ),
            ("norm", self.norm != "rmsnorm", self.norm),
            ("norm_bias", self.norm_bias, "on what norms give"),
            ("embed_norm", self.embed_norm, "a norm behind the embedding"),
            ("bare_norms", self.bare_norms, "without weights, behind the embedding, on q and k"),
            ("attention_gate", self.attention_gate, "a sigmoid on what attention gives"),
            ("positions", self.positions != "rope", f"{self.positions}, no RoPE"),
            ("no_pre_norms", not self.pre_norms, "nothing before attention and feed-forward"),
            ("post_norms", self.post_norms, "after attention and feed-forward"),
            ("parallel_residual", self.parallel_residual, "attention beside feed-forward"),
            ("parallel_norms", self.parallel_norms, "beside each other, each with its norm"),
            ("ungated", not self.gated, "a feed-forward block without a gate"),
            ("activation", self.activation != "silu", self.activation),
            (
                "clamped_glu",
                self.glu_limit is not None,
                f"gate and up within {self.glu_limit}, up plus one, alpha {self.glu_alpha}",
            ),
            ("sinks", self.sinks, "a number per head in the softmax of attention"),
            *(
                (name, value != neutral, f"{value}")
                for name, value, neutral in (
                    ("attn_softcap", self.attn_logit_softcap, None),
                    ("final_softcap", self.final_logit_softcap, None),
                    ("query_multiplier", self.query_multiplier or usual, usual),
                    ("embedding_multiplier", self.embedding_multiplier, 1.0),
                    ("residual_multiplier", self.residual_multiplier, 1.0),
                    ("logits_scaling", self.logits_scaling, 1.0),
                )
            ),
            ("score", self.head.startswith("score"), f"{self.n_classes} scores for logits"),
            ("score_bias", self.head == "score_bias", "on scores of every token"),
            ("spans", self.head == "spans", "starts and ends of answers for logits"),
            ("no_head", self.head == "none", "nothing behind the last layer"),
            ("experts", self.experts is not None, f"{self.experts}"),
            (
                "expert_bias",
                self.experts is not None and self.experts.bias,
                "on the router and in routed experts",
            ),
            ("latent_attention", self.latent is not None, f"{self.latent}"),
            (
                "latent_bias",
                self.latent is not None and self.latent.bias,
                "on the projections into ranks",
            ),
        )
        return {name: text for name, present, text in rows if present} | dict(self.special)
