"""Classes of transformers with experts that compute what no other class does, by ``model_type``.

Their config.json is written as it was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.families.configs.model_type import (
    ANY,
    BIASES,
    EXPERTS,
    LATENT,
    QK_NORM,
    SIGMOID,
    WINDOWS,
    ModelType,
    Routing,
)

_INDEXED = LATENT | EXPERTS | {"indexer"}
_GATED = frozenset({"attention_gate", "post_norms"})

_DEEPSEEK: dict[str, object] = {
    "tie_word_embeddings": False,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "rope_theta": 10_000.0,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_topk": 2048,
    "index_head_dim": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _indexers(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Which layers choose tokens by an indexer of their own; the others take those of the last.

    Source: ``GlmMoeDsaConfig.__post_init__`` of transformers 5.23.0.
    """
    count, said = fields.get("num_hidden_layers"), fields.get("index_topk_pattern")
    if fields.get("indexer_types") is not None or not isinstance(count, int) or count > 100_000:
        return fields
    words = {"F": "full", "S": "shared"}
    if isinstance(said, str | list):
        types = [words.get(str(word), word) for word in said]
    else:
        step, start = fields.get("index_topk_freq", 1), fields.get("index_skip_topk_offset", 2)
        if not isinstance(step, int) or not isinstance(start, int):
            return fields
        behind = (max(layer - start + 1, 0) % max(step, 1) for layer in range(count))
        types = ["shared" if rest else "full" for rest in behind]
    return {**fields, "indexer_types": types}


def _one_number(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Lists of one number per layer as that number, and no switches of attention that the class
    does not have, which the first files state as false."""
    off = ("n_group", "topk_group", "routed_scaling_factor")
    found = {name: value for name, value in fields.items() if value is not False or name not in off}
    for name in ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert"):
        value = found.get(name)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            found[name] = value[0]
    return found


APART: Mapping[str, ModelType] = {
    "deepseek_v32": ModelType(
        "DeepseekV32ForCausalLM",
        {
            **_DEEPSEEK,
            "num_key_value_heads": 128,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 163_840,
            "n_group": 8,
            "topk_group": 4,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "index_n_heads": 64,
        },
        routing=replace(SIGMOID, dense="any"),
        expresses=ANY | _INDEXED | {"latent_bias", "o_bias"},
        requires=_INDEXED,
        assumes={"mlp_bias": False},
        is_copied=True,
    ),
    "glm_moe_dsa": ModelType(
        "GlmMoeDsaForCausalLM",
        {
            **_DEEPSEEK,
            "num_key_value_heads": 64,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 202_752,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 2048,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "index_n_heads": 32,
        },
        routing=replace(SIGMOID, dense="any"),
        expresses=ANY | _INDEXED | {"latent_bias", "o_bias"},
        requires=_INDEXED,
        assumes={"mlp_bias": False},
        completes=_indexers,
        is_copied=True,
    ),
    "afmoe": ModelType(
        "AfmoeForCausalLM",
        {
            "tie_word_embeddings": False,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 16_384,
            "rope_theta": 10_000.0,
            "sliding_window": 1024,
            "global_attn_every_n_layers": 4,
            "moe_intermediate_size": 1408,
            "num_dense_layers": 1,
            "num_experts": 64,
            "num_experts_per_tok": 6,
            "num_shared_experts": 2,
        },
        {
            "qk_norm": True,
            "post_norms": True,
            "attention_gate": True,
        },
        routing=replace(SIGMOID, norm_topk=True, groups=False),
        expresses=ANY
        | BIASES
        | WINDOWS
        | QK_NORM
        | EXPERTS
        | _GATED
        | {"no_rope_layers", "embedding_multiplier"},
        requires=QK_NORM | EXPERTS | _GATED,
        allows={"score_func": ("sigmoid",), "route_norm": (True,)},
        assumes={"n_group": None},
        is_copied=True,
    ),
    "llama4_text": ModelType(
        "Llama4ForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 500_000.0,
            "intermediate_size_mlp": 16_384,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "no_rope_layer_interval": 4,
            "use_qk_norm": True,
            "attention_chunk_size": 8192,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        routing=Routing("sigmoid", norm_topk=False, shared="any", dense="any"),
        expresses=ANY
        | BIASES
        | EXPERTS
        | {"no_rope_layers", "layer_types", "scaled_inputs", "qk_norm_plain", "temperature"},
        requires=EXPERTS | {"scaled_inputs"},
        allows={"for_llm_compressor": (False,)},
        is_copied=True,
    ),
    "hunyuan_v1_moe": ModelType(
        "HunYuanMoEV1ForCausalLM",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "num_experts": 1,
            "moe_topk": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        {"special": {"qk_norm_late": "on q and k behind RoPE"}},
        routing=Routing(norm_topk=True, shared="whole"),
        expresses=ANY | BIASES | EXPERTS | {"qk_norm_late"},
        requires=EXPERTS | {"qk_norm_late"},
        allows={
            "use_qk_norm": (True,),
            "use_cla": (False,),
            "use_mla": (False,),
            "use_mixed_mlp_moe": (True,),
            "use_rotary_pos_emb": (True,),
            "num_shared_expert": (1,),
            "norm_type": ("rms",),
            "group_limited_greedy": (False,),
            "moe_layer_num_skipped": (0,),
            "position_embedding_xdrope": (False,),
        },
        completes=_one_number,
        is_copied=True,
    ),
    "phimoe": ModelType(
        "PhimoeForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {
            "norm": "layernorm",
            "norm_bias": True,
            "special": {"sparse_mixer": "two experts, each weighed against those near it"},
        },
        routing=Routing(norm_topk=False),
        expresses=ANY
        | BIASES
        | EXPERTS
        | {"norm", "norm_bias", "sparse_mixer", "head_bias", "sliding_window"},
        requires=EXPERTS | {"norm", "norm_bias", "sparse_mixer"},
        is_copied=True,
    ),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""
