"""Classes of transformers from before Llama: LayerNorms with biases, blocks without a gate."""

from __future__ import annotations

from collections.abc import Mapping

from dcpconv.families.configs.model_type import BIASES, ModelType

_NORMS = frozenset({"norm", "norm_bias"})
_UNGATED = frozenset({"ungated", "activation"})
_MLP_BIAS = frozenset({"mlp_bias"})
_ROPE = frozenset({"rope_scaling", "partial_rotary"})
_LAYER_NORM: dict[str, object] = {"norm": "layernorm", "norm_bias": True}
_ALL_BIASES: dict[str, object] = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True)
_NO_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_ONE_HEAD_SIZE = frozenset({"head_dim"})
_NO_GROUPS = frozenset({"num_key_value_heads"})

CLASSICS: Mapping[str, ModelType] = {
    "phi": ModelType(
        "PhiForCausalLM",
        {
            "tie_word_embeddings": False,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {
            **_LAYER_NORM,
            **_ALL_BIASES,
            "head_bias": True,
            "gated": False,
            "parallel_residual": True,
        },
        expresses=_NORMS
        | _UNGATED
        | _ROPE
        | BIASES
        | _MLP_BIAS
        | {"head_bias", "parallel_residual", "qk_norm"},
        requires=_NORMS | BIASES | _MLP_BIAS | {"ungated", "head_bias", "parallel_residual"},
        spellings={"layer_norm_eps": "rms_norm_eps"},
    ),
    "starcoder2": ModelType(
        "Starcoder2ForCausalLM",
        {
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 2,
            "norm_epsilon": 1e-5,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "sliding_window": None,
            "use_bias": True,
            "bos_token_id": 50_256,
            "eos_token_id": 50_256,
        },
        {**_LAYER_NORM, "gated": False},
        expresses=_NORMS | _UNGATED | BIASES | _MLP_BIAS | {"rope_scaling", "sliding_window"},
        requires=_NORMS | {"ungated"},
        spellings={"norm_epsilon": "rms_norm_eps"},
    ),
    "stablelm": ModelType(
        "StableLmForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        _LAYER_NORM,
        expresses=_NORMS | _ROPE | {"activation", "qkv_bias", "parallel_residual", "qk_norm_heads"},
        requires=_NORMS,
        spellings={"layer_norm_eps": "rms_norm_eps"},
        silent=_ONE_HEAD_SIZE,
    ),
    "gpt_neox": ModelType(
        "GPTNeoXForCausalLM",
        {
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rotary_emb_base": 10_000.0,
            "rotary_pct": 0.25,
            "attention_bias": True,
            "use_parallel_residual": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        {**_LAYER_NORM, "gated": False, "mlp_bias": True},
        expresses=_NORMS
        | _UNGATED
        | _ROPE
        | BIASES
        | _MLP_BIAS
        | {"parallel_residual", "parallel_norms"},
        requires=_NORMS | _MLP_BIAS | {"ungated"},
        spellings={
            "layer_norm_eps": "rms_norm_eps",
            "rotary_emb_base": "rope_theta",
            "rotary_pct": "partial_rotary_factor",
        },
        silent=_ONE_HEAD_SIZE | _NO_GROUPS,
    ),
    "gpt2": ModelType(
        "GPT2LMHeadModel",
        {
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "n_positions": 1024,
            "scale_attn_weights": True,
            "bos_token_id": 50_256,
            "eos_token_id": 50_256,
        },
        {**_LAYER_NORM, **_ALL_BIASES, "gated": False, "positions": "learned"},
        expresses=_NORMS | _UNGATED | BIASES | _MLP_BIAS | {"positions", "query_multiplier"},
        requires=_NORMS | BIASES | _MLP_BIAS | {"ungated", "positions"},
        spellings={
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
            "n_inner": "intermediate_size",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "rms_norm_eps",
        },
        heeds=frozenset(
            {"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
        ),
        silent=_ONE_HEAD_SIZE | _NO_GROUPS | _NO_ROPE,
        ffn_times=4,
    ),
    "falcon": ModelType(
        "FalconForCausalLM",
        {
            "tie_word_embeddings": True,
            "activation": "gelu",
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "alibi": False,
            "bias": False,
            "bos_token_id": 11,
            "eos_token_id": 11,
        },
        {**_LAYER_NORM, "gated": False},
        expresses=_NORMS
        | _UNGATED
        | BIASES
        | _MLP_BIAS
        | {"rope_scaling", "positions", "parallel_residual", "parallel_norms"},
        requires=_NORMS | {"ungated"},
        spellings={
            "num_kv_heads": "num_key_value_heads",
            "ffn_hidden_size": "intermediate_size",
            "activation": "hidden_act",
            "layer_norm_epsilon": "rms_norm_eps",
        },
        older={
            "n_embed": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
        },
        silent=_ONE_HEAD_SIZE,
        ffn_times=4,
    ),
    "bloom": ModelType(
        "BloomForCausalLM",
        {
            "tie_word_embeddings": True,
            "layer_norm_epsilon": 1e-5,
            "seq_length": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {
            **_LAYER_NORM,
            **_ALL_BIASES,
            "gated": False,
            "positions": "alibi",
            "embed_norm": True,
            "activation": "gelu_pytorch_tanh",
        },
        expresses=_NORMS | BIASES | _MLP_BIAS | _UNGATED | {"positions", "embed_norm"},
        requires=_NORMS | BIASES | _MLP_BIAS | _UNGATED | {"positions", "embed_norm"},
        spellings={
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "seq_length": "max_position_embeddings",
            "layer_norm_epsilon": "rms_norm_eps",
        },
        older={"n_embed": "hidden_size"},
        heeds=frozenset({"num_hidden_layers", "num_attention_heads"}),
        silent=_ONE_HEAD_SIZE | _NO_GROUPS | _NO_ROPE | {"intermediate_size", "hidden_act"},
        ffn_times=4,
    ),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""
