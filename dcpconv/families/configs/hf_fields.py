"""The fields of config.json that we look at, under every name they have had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dcpconv.core.record import Json, Record, field
from dcpconv.core.spec import Count, Positive, Size

TEXT: Final = "text_config"
"""What a class with a vision or audio tower says of its language model."""


def nested_text(fields: Mapping[str, object], language: object) -> Mapping[str, object]:
    """The fields of the language model, whether they are nested or not; a class's own name and what
    it ties stand outside.

    Args:
        fields: The file.
        language: Class of the language model.
    """
    inner = fields.get(TEXT)
    if not isinstance(inner, Mapping):
        return fields if language is None else {**fields, "model_type": language}
    outside = {name: value for name, value in fields.items() if name != TEXT}
    own = {name: fields[name] for name in ("architectures",) if name in fields}
    own |= {} if language is None else {"model_type": language}
    tied = {name: fields[name] for name in ("tie_word_embeddings",) if fields.get(name) is not None}
    return {**outside, **inner, **own, **tied}


class HfConfig(Record, extra="allow"):
    """The fields of config.json that say something about arithmetic; the rest is carried over."""

    model_type: str
    architectures: list[str] | None = None
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size
    rms_norm_eps: Positive = field(
        names=("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    )
    # The base class of transformers 4 ties unless told otherwise, and leaves its own defaults out.
    tie_word_embeddings: bool = True
    dtype: str | None = None
    torch_dtype: str | None = None

    rope_theta: Positive | None = None
    rope_scaling: dict[str, Json] | None = None
    rope_parameters: dict[str, Json] | None = None
    partial_rotary_factor: Positive | None = None

    attention_bias: bool = False
    qkv_bias: bool | None = None
    mlp_bias: bool = False
    use_bias: bool | None = False
    hidden_act: str = "silu"
    hidden_activation: str | None = None

    use_sliding_window: bool = True
    sliding_window: int | None = field(default=None, ge=0)
    max_window_layers: int | None = None
    layer_types: list[str] | None = None

    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    query_pre_attn_scalar: Positive | None = None
    attention_multiplier: Positive | None = None
    embedding_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0

    num_experts: int | None = field(
        default=None,
        ge=0,
        names=("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    )
    num_experts_per_tok: Count | None = field(
        default=None, names=("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    )
    moe_intermediate_size: Size | None = None
    n_shared_experts: int | None = field(
        default=None,
        ge=0,
        names=("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"),
    )
    shared_expert_intermediate_size: int | None = field(
        default=None,
        ge=0,
        names=("shared_expert_intermediate_size", "shared_intermediate_size"),
    )
    norm_topk_prob: bool = False
    first_k_dense_replace: int = field(
        default=0, ge=0, names=("first_k_dense_replace", "num_dense_layers")
    )
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[int] | None = None
    moe_layer_start_index: int = field(default=0, ge=0)
    moe_layer_end_index: int = -1
    moe_layer_interval: Count = 1
    routed_scaling_factor: Positive = field(
        default=1.0,
        names=(
            *("routed_scaling_factor", "router_scaling_factor", "route_scale"),
            "moe_routed_scaling_factor",
        ),
    )
    n_group: Count | None = None
    topk_group: Count | None = None

    q_lora_rank: Size | None = None
    kv_lora_rank: Size | None = None
    qk_nope_head_dim: Size | None = None
    qk_rope_head_dim: Size | None = None
    v_head_dim: Size | None = None

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
