"""Tiny models of every kind that tables distinguish, as their parameter files describe them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcpconv.core.spec import Experts, LatentAttention, ModelSpec

PLAIN: dict[str, Any] = {
    "vocab_size": 7,
    "hidden_size": 5,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 8,
    "ffn_size": 3,
    "max_seq_len": 9,
}
_MOE = Experts(count=3, per_token=2, ffn_size=4)
_SHARED = Experts(count=3, per_token=2, ffn_size=4, shared_count=2, shared_ffn_size=2)
_ONE_SHARED = Experts(count=3, per_token=2, ffn_size=4, shared_count=1, shared_ffn_size=4)
_LATENT = LatentAttention(q_rank=5, kv_rank=3, nope_dim=4, value_dim=6)

_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
_GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 3,
}
_VISION = {
    "depth": 2,
    "hidden_size": 3,
    "intermediate_size": 7,
    "num_position_embeddings": 5,
    "in_channels": 3,
    "temporal_patch_size": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 5,
}
_TOWER = {
    "vision_config": {
        "hidden_size": 12,
        "intermediate_size": 7,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "patch_size": 2,
        "patch_temporal": 2,
        "pos_emb_height": 5,
        "pos_emb_width": 3,
        "merge_kernel_size": 2,
        "image_size": 6,
        "projector_input_dim": 9,
        "vision_output_dim": 10,
    },
    "out_hidden_size": 48,
    "projector_hidden_size": 9,
}
_BY_KIND = {
    "layer_types": ["sliding_attention", "full_attention"] * 6,
    "num_hidden_layers": 12,
    "global_head_dim": 6,
    "num_global_key_value_heads": 3,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 1,
    "vocab_size_per_layer_input": 11,
    "hidden_size_per_layer_input": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "v_head_dim": 5,
    "num_attention_heads_per_layer": [6, 4] * 6,
    "gating": "per-element",
}
_WEIGHED = Experts(
    count=3, per_token=2, ffn_size=4, shared_count=1, shared_ffn_size=3, shared_gate=True
)
_INDEXER = {
    "index_n_heads": 2,
    "index_head_dim": 3,
}
_MAMBA = {
    "mamba_num_heads": 3,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 5,
    "conv_kernel": 3,
    "moe_latent_size": 3,
    "use_bias": True,
    "use_conv_bias": True,
}
_MAMBA_2 = {
    "mamba_n_heads": 3,
    "mamba_d_head": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_d_conv": 3,
    "mamba_proj_bias": True,
    "mamba_conv_bias": True,
}
_SCAN = {
    "hidden_size": 5,
    "mamba_expand": 2,
    "mamba_d_state": 4,
    "mamba_dt_rank": 3,
    "mamba_d_conv": 3,
    "mamba_proj_bias": True,
    "mamba_conv_bias": True,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
_STATES = {
    "num_heads": 3,
    "head_dim": 4,
    "n_groups": 2,
    "state_size": 5,
    "conv_kernel": 3,
    "use_bias": True,
    "use_conv_bias": True,
}
_CONVOLUTION = {
    "hidden_size": 5,
    "conv_L_cache": 3,
    "conv_bias": True,
    "use_expert_bias": True,
    "layer_types": ["conv", "full_attention"] * 6,
}
_DELTA = {
    "linear_num_heads": 3,
    "linear_head_dim": 4,
    "linear_conv_kernel_dim": 3,
    "qk_head_dim": 12,
    "v_head_dim": 6,
    "layer_types": ["full_attention", "linear_attention"] * 6,
}

KINDS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "qkv-bias": {"qkv_bias": True},
    "biases": {"qkv_bias": True, "o_bias": True},
    "all-biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "as-many-kv-heads": {"n_kv_heads": 6, "qkv_bias": True},
    "qk-norm": {"qk_norm": True},
    "qk-norm-whole": {"qk_norm_whole": True},
    "qk-norm-heads": {"qk_norm_heads": True},
    "qk-norm-biases": {"qk_norm": True, "qkv_bias": True, "o_bias": True},
    "score": {"head": "score", "n_classes": 3},
    "score-tokens": {"head": "score_bias", "n_classes": 3},
    "spans": {"head": "spans"},
    "no-head": {"head": "none"},
    "all-biases-head": {"head_bias": True, **_BIASES},
    "all-biases-qk-norm": {"head_bias": True, "qk_norm": True, **_BIASES},
    "all-biases-as-many-kv-heads": {"n_kv_heads": 6, **_BIASES},
    "beside": {"parallel_residual": True, "qkv_bias": True},
    "beside-qk-norm-heads": {"parallel_residual": True, "qk_norm_heads": True},
    "beside-each-its-norm": {"parallel_residual": True, "parallel_norms": True, **_BIASES},
    "experts": {"experts": _MOE},
    "experts-shared": {"experts": _SHARED},
    "experts-one-shared": {"experts": _ONE_SHARED},
    "experts-gated-shared": {"experts": _SHARED.model_copy(update={"shared_gate": True})},
    "experts-biases": {"experts": _SHARED, "qkv_bias": True, "o_bias": True},
    "experts-all-biases": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    },
    "experts-qk-norm": {"experts": _MOE, "qk_norm": True},
    "some-dense": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
    },
    "some-dense-qk-norm": {
        "experts": _MOE.model_copy(update={"dense_layers": (1,)}),
        "qk_norm": True,
        "qkv_bias": True,
        "o_bias": True,
    },
    "gated-delta": {"qk_norm": True, "stated": _GATED_DELTA},
    "gated-delta-biases": {
        "qk_norm": True,
        "qkv_bias": True,
        "o_bias": True,
        "stated": _GATED_DELTA,
    },
    "gated-delta-experts": {"qk_norm": True, "experts": _WEIGHED, "stated": _GATED_DELTA},
    "gated-delta-some-dense": {
        "qk_norm": True,
        "experts": _WEIGHED.model_copy(update={"dense_layers": (1,)}),
        "stated": _GATED_DELTA,
    },
    "gated-delta-vision": {
        "qk_norm": True,
        "stated": {**_GATED_DELTA, "vision_config": _VISION},
    },
    "gated-delta-vision-experts": {
        "qk_norm": True,
        "experts": _WEIGHED,
        "stated": {**_GATED_DELTA, "vision_config": _VISION},
    },
    "by-kind": {"qk_norm": True, "experts": _MOE, "stated": _BY_KIND, **_BIASES},
    "by-kind-some-dense": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
        "parallel_residual": True,
        "stated": _BY_KIND,
        "qkv_bias": True,
        "o_bias": True,
    },
    "double": {
        "experts": _MOE,
        "latent": _LATENT.model_copy(update={"bias": True}),
        "o_bias": True,
        "stated": {"num_layers": 2, "n_routed_experts": 3, "zero_expert_num": 2},
    },
    "latent": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
        "latent": _LATENT,
    },
    "latent-direct": {
        "experts": _SHARED,
        "latent": _LATENT.model_copy(update={"q_rank": None}),
    },
    "latent-biased": {
        "experts": _SHARED,
        "latent": _LATENT.model_copy(update={"bias": True}),
        "o_bias": True,
    },
    "latent-tower": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
        "latent": _LATENT,
        "stated": _TOWER,
    },
    "latent-tower-biased": {
        "experts": _SHARED,
        "latent": _LATENT.model_copy(update={"bias": True}),
        "o_bias": True,
        "stated": _TOWER,
    },
    "latent-direct-tower": {
        "experts": _SHARED,
        "latent": _LATENT.model_copy(update={"q_rank": None}),
        "stated": _TOWER,
    },
    "tower": {"stated": _TOWER},
    "tower-biases": {"qkv_bias": True, "o_bias": True, "stated": _TOWER},
    "tower-some-dense": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
        "qkv_bias": True,
        "o_bias": True,
        "stated": _TOWER,
    },
    "latent-indexer": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
        "latent": _LATENT,
        "stated": _INDEXER,
    },
    "latent-indexer-biased": {
        "experts": _SHARED,
        "latent": _LATENT.model_copy(update={"bias": True}),
        "o_bias": True,
        "stated": _INDEXER,
    },
    "latent-indexer-in-some": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
        "latent": _LATENT.model_copy(update={"bias": True}),
        "o_bias": True,
        "stated": {**_INDEXER, "indexer_types": ["full", "shared"] * 6},
    },
    "latent-none-shared": {
        "experts": _MOE,
        "latent": _LATENT,
    },
    "states-and-experts": {
        "experts": _SHARED,
        "mlp_bias": True,
        "stated": {**_MAMBA, "layers_block_type": ["linear_attention", "moe"] * 6},
    },
    "states-beside-attention": {
        "qkv_bias": True,
        "o_bias": True,
        "experts": _MOE,
        "stated": {**_MAMBA_2, "layer_types": ["linear_attention", "full_attention"] * 6},
    },
    "states-in-all": {
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "stated": {
            **_MAMBA_2,
            "mamba_rms_norm": True,
            "projectors_bias": True,
            "attn_layer_indices": [1, 3, 5, 7, 9, 11],
        },
    },
    "states-alone": {"stated": _STATES},
    "deltas": {
        "experts": _SHARED.model_copy(update={"dense_layers": (0,)}),
        "latent": _LATENT.model_copy(update={"q_rank": None, "bias": True}),
        "o_bias": True,
        "stated": _DELTA,
    },
    "scans": {
        "experts": _MOE.model_copy(update={"dense_layers": (1,)}),
        "stated": _SCAN,
    },
    "convolutions": {"qk_norm": True, "stated": _CONVOLUTION},
    "convolutions-experts": {
        "qk_norm": True,
        "experts": _MOE.model_copy(update={"dense_layers": (0,)}),
        "stated": _CONVOLUTION,
    },
    "states-and-attention": {
        "mlp_bias": True,
        "stated": {**_MAMBA, "layers_block_type": ["mlp", "full_attention"] * 6},
    },
}
"""A model for every combination of conditions that tables distinguish."""


def spec_of(kind: str, **sizes: Any) -> ModelSpec:
    """A tiny model of a kind; odd sizes, so that no two axes are alike by chance.

    Its file states the counts of heads, from which a table may take an index.
    """
    fields = {**PLAIN, **KINDS[kind], **sizes}
    stated = {"num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads"}
    heads = {name: fields[own] for name, own in stated.items()}
    return ModelSpec(**{**fields, "stated": {**heads, **fields.get("stated", {})}})
