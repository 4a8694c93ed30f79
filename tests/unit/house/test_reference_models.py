"""The reference models against the models that transformers ships, by their logits in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lingua_model import LinguaModel
from support.models.chatglm import ChatGLM, ChatGLMConfig
from support.models.hf_models import MODEL_TYPES, save_hf, tiny
from support.models.layers import (
    halves_from_pairs,
    pairs_from_halves,
    random_tokens,
    randomise,
)
from support.models.minimind import GenerationName, MiniMind, MiniMindConfig, save_pth

RIGHT = 1e-4
"""Largest |logit difference| of equal models in fp32; the logits' standard deviation is about 1."""
WRONG = 1e-2
"""What a missing RoPE relabelling exceeds by far."""

HEADS, KV_HEADS = 6, 2
TOKENS = random_tokens(131)
LINGUA = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output.tied_module.weight": "model.embed_tokens.weight",
}
LINGUA_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def _hf_key(key: str) -> str:
    """The Hugging Face name of a Meta-style key."""
    if not key.startswith("layers."):
        return LINGUA[key]
    _, index, rest = key.split(".", 2)
    return f"model.layers.{index}.{LINGUA_LAYER[rest]}"


def _difference(left: nn.Module, right: Any) -> float:
    with torch.no_grad():
        a, b = left(TOKENS), right(TOKENS)
    logits = b if isinstance(b, Tensor) else b.logits
    return float((a - logits).abs().max())


def _relabelled(state: dict[str, Tensor], suffixes: tuple[str, str]) -> dict[str, Tensor]:
    """Query and key rows of ``state`` from ``(h p two)`` to ``(h two p)``."""
    heads = dict(zip(suffixes, (HEADS, KV_HEADS), strict=True))
    return {
        key: next(
            (halves_from_pairs(value, n) for suffix, n in heads.items() if key.endswith(suffix)),
            value,
        )
        for key, value in state.items()
    }


LLAMAS = [
    pytest.param({}, {}, id="untied"),
    pytest.param({"tie_word_embeddings": True}, {"weight_tying": True}, id="tied"),
    pytest.param({"head_dim": 24}, {"head_dim": 24}, id="head-dim-apart"),
    pytest.param({"num_key_value_heads": 6}, {"n_kv_heads": 6}, id="multi-head"),
    pytest.param(
        {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"norm_eps": 1e-6, "rope_theta": 5e5},
        id="theta-and-eps",
    ),
]


@pytest.mark.parametrize(("config", "params"), LLAMAS)
def test_lingua_equals_llama_once_relabelled(
    config: dict[str, Any], params: dict[str, object]
) -> None:
    llama = tiny("llama", **config)
    sizes = {
        "dim": 96,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 2,
        "multiple_of": 8,
        "ffn_dim_multiplier": 0.58,  # int(0.58 * 256) = 148, rounded up to 152
        "max_seqlen": 64,
        "vocab_size": 131,
    }
    with torch.device("meta"):
        model = LinguaModel.from_params({"model": {**sizes, **params, "seed": 42}})
    state = llama.state_dict()
    plain = {key: state[_hf_key(key)] for key in model.state_dict()}
    heads = {"wq.weight": HEADS, "wk.weight": model.params.kv_heads}
    right = {
        key: next(
            (pairs_from_halves(value, n) for suffix, n in heads.items() if key.endswith(suffix)),
            value,
        )
        for key, value in plain.items()
    }

    model.to_empty(device="cpu")
    model.rope_embeddings.reset_parameters()
    model.load_state_dict(right)
    assert _difference(model, llama) < RIGHT
    model.load_state_dict(plain)
    assert _difference(model, llama) > WRONG


def test_lingua_state_dict_has_linguas_keys_in_linguas_order() -> None:
    params = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 7, "weight_tying": True}
    assert list(LinguaModel.from_params({"model": params}).state_dict()) == [
        "layers.0.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "layers.0.attention.wv.weight",
        "layers.0.attention.wo.weight",
        "layers.0.feed_forward.w1.weight",
        "layers.0.feed_forward.w3.weight",
        "layers.0.feed_forward.w2.weight",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "tok_embeddings.weight",
        "norm.weight",
        "output.tied_module.weight",
    ]


@pytest.mark.parametrize("seed", range(2))
def test_lingua_init_weights_is_a_function_of_the_seed(seed: int) -> None:
    params = {"model": {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 7}}
    first, second = (LinguaModel.from_params(params) for _ in range(2))
    first.init_weights(seed=seed)
    second.init_weights(seed=seed)
    assert torch.equal(first(TOKENS % 7), second(TOKENS % 7))
    second.init_weights(seed=seed + 1)
    assert not torch.equal(first(TOKENS % 7), second(TOKENS % 7))


def _as_llama(model: MiniMind, *, relabel: bool) -> dict[str, Tensor]:
    state = model.state_dict()
    if model.config.facts.interleaved:
        state = {_hf_key(key): value for key, value in state.items()}
    if relabel:
        state = _relabelled(state, ("q_proj.weight", "k_proj.weight"))
    return state


DENSE = [
    pytest.param("gen1", "llama", True, id="gen1-llama"),
    pytest.param("gen2", "llama", True, id="gen2-llama"),
    pytest.param("gen3", "llama", False, id="gen3-llama"),
    pytest.param("gen4", "qwen3", False, id="gen4-qwen3"),
]


@pytest.mark.parametrize(("generation", "model_type", "relabel"), DENSE)
def test_dense_minimind_equals_its_hf_twin(
    generation: GenerationName, model_type: str, *, relabel: bool
) -> None:
    model = randomise(MiniMind(MiniMindConfig(generation=generation)))
    facts = model.config.facts
    twin = tiny(
        model_type,
        tie_word_embeddings=True,
        rms_norm_eps=facts.eps,
        rope_parameters={"rope_theta": facts.theta, "rope_type": "default"},
    )
    twin.load_state_dict(_as_llama(model, relabel=relabel))
    assert _difference(model, twin) < RIGHT
    twin.load_state_dict(_as_llama(model, relabel=not relabel))
    assert _difference(model, twin) > WRONG


@pytest.mark.parametrize("generation", ["gen1", "gen2"])
def test_dense_minimind_of_the_first_generations_is_a_lingua_model(
    generation: GenerationName,
) -> None:
    model = randomise(MiniMind(MiniMindConfig(generation=generation)))
    state = model.state_dict()
    state["output.tied_module.weight"] = state.pop("output.weight")
    params = {
        "dim": 96,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 2,
        "multiple_of": 152,
        "ffn_dim_multiplier": 0.5,
        "vocab_size": 131,
        "weight_tying": True,
        "rope_theta": model.config.facts.theta,
    }
    lingua = LinguaModel.from_params({"model": params})
    lingua.load_state_dict(state)
    assert _difference(lingua, model) < RIGHT


def _stacked(state: dict[str, Tensor], prefix: str, experts: int) -> dict[str, Tensor]:
    """The fused names that transformers 5 has in memory."""
    gate, up, down = (
        torch.stack([state[f"{prefix}.experts.{e}.{part}_proj.weight"] for e in range(experts)])
        for part in ("gate", "up", "down")
    )
    return {
        f"{prefix}.experts.gate_up_proj": torch.cat((gate, up), 1),
        f"{prefix}.experts.down_proj": down,
    }


@pytest.mark.parametrize("top_k", [1, 2])
def test_gen4_experts_equal_qwen3_moe(top_k: int) -> None:
    config = MiniMindConfig(generation="gen4", experts=5, top_k=top_k, ffn_dim=52)
    model = randomise(MiniMind(config))
    twin = tiny(
        "qwen3_moe",
        tie_word_embeddings=True,
        num_experts_per_tok=top_k,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )
    state = model.state_dict()
    for layer in range(3):
        state.update(_stacked(state, f"model.layers.{layer}.mlp", 5))
    twin.load_state_dict({key: state[key] for key in twin.state_dict()})
    assert _difference(model, twin) < RIGHT


ERNIES = [
    pytest.param("gen1", 1, id="gen1"),
    pytest.param("gen2", 1, id="gen2"),
    pytest.param("gen3", 1, id="gen3"),
    pytest.param("gen3", 2, id="gen3-two-shared"),
]
EXPERT_NAMES = {
    "feed_forward.shared_experts.w": "mlp.shared_experts.0.w",  # gen1 and gen2 do not count them
    "feed_forward.": "mlp.",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}


def _hf_expert_key(key: str) -> str:
    if "feed_forward" not in key:
        return _hf_key(key)
    for ours, theirs in EXPERT_NAMES.items():
        key = key.replace(ours, theirs)
    return f"model.{key}"


@pytest.mark.parametrize(("generation", "shared"), ERNIES)
def test_experts_with_a_shared_one_equal_ernie(generation: GenerationName, shared: int) -> None:
    config = MiniMindConfig(generation=generation, experts=5, ffn_dim=52, shared_experts=shared)
    model = randomise(MiniMind(config))
    twin = tiny(
        "ernie4_5_moe",
        tie_word_embeddings=True,
        moe_layer_start_index=0,
        moe_num_shared_experts=shared,
        rope_parameters={"rope_theta": config.facts.theta, "rope_type": "default"},
    )
    state = model.state_dict()
    if config.facts.interleaved:  # as in Ernie
        state = {_hf_expert_key(key): value for key, value in state.items()}
    else:
        for key in state:
            if key.endswith(("q_proj.weight", "k_proj.weight")):
                state[key] = pairs_from_halves(state[key], HEADS if "q_proj" in key else KV_HEADS)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp"
        state.update(_stacked(state, prefix, 5))
        state[f"{prefix}.gate.moe_statics.e_score_correction_bias"] = torch.zeros(1, 5)
        for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
            # Several shared experts side by side are one of their summed width.
            name = f"{part}_proj.weight"
            parts = [state[f"{prefix}.shared_experts.{j}.{name}"] for j in range(shared)]
            state[f"{prefix}.shared_experts.{name}"] = torch.cat(parts, dim)
    twin.load_state_dict({key: state[key] for key in twin.state_dict()})
    assert _difference(model, twin) < RIGHT


def _split_qkv(fused: Tensor, config: ChatGLMConfig) -> tuple[Tensor, Tensor, Tensor]:
    e, h, g = config.kv_channels, config.num_attention_heads, config.groups
    if config.multi_query_attention:
        q, k, v = torch.split(fused, [h * e, g * e, g * e])
        return q, k, v
    q, k, v = fused.reshape(h, 3, e, *fused.shape[1:]).unbind(1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


CHATGLMS = [
    pytest.param(ChatGLMConfig(), id="groups"),
    pytest.param(ChatGLMConfig(multi_query_attention=False), id="no-groups"),
    pytest.param(ChatGLMConfig(add_qkv_bias=False), id="no-bias"),
    pytest.param(ChatGLMConfig(rope_ratio=500.0, layernorm_epsilon=1.5625e-7), id="rope-ratio"),
    pytest.param(ChatGLMConfig(kv_channels=24), id="head-dim-apart"),
]


@pytest.mark.parametrize("config", CHATGLMS)
def test_chatglm_equals_glm(config: ChatGLMConfig) -> None:
    model = randomise(ChatGLM(config))
    twin = tiny(
        "glm",
        num_key_value_heads=config.groups,
        head_dim=config.kv_channels,
        attention_bias=config.add_qkv_bias,
        rms_norm_eps=config.layernorm_epsilon,
        rope_parameters={
            "rope_theta": config.theta,
            "rope_type": "default",
            "partial_rotary_factor": 0.5,
        },
    )
    names = {
        "self_attention.dense.weight": "self_attn.o_proj.weight",
        "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
        "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    }
    state = model.state_dict()
    target = {
        "model.embed_tokens.weight": state["transformer.embedding.word_embeddings.weight"],
        "model.norm.weight": state["transformer.encoder.final_layernorm.weight"],
        "lm_head.weight": state["transformer.output_layer.weight"],
    }
    for layer in range(3):
        source, prefix = f"transformer.encoder.layers.{layer}", f"model.layers.{layer}"
        for ours, theirs in names.items():
            target[f"{prefix}.{theirs}"] = state[f"{source}.{ours}"]
        for kind in ("weight", "bias")[: 1 + config.add_qkv_bias]:
            fused = state[f"{source}.self_attention.query_key_value.{kind}"]
            for part, tensor in zip("qkv", _split_qkv(fused, config), strict=True):
                target[f"{prefix}.self_attn.{part}_proj.{kind}"] = tensor
    twin.load_state_dict(target)
    assert _difference(model, twin) < RIGHT


ONLY_FIVE = {"cwm", "gemma4_text", "laguna", "mellum", "mimo_v2_flash", "ministral3"}
"""Classes that take their own RoPE where none is nested, whatever ``rope_theta`` says outside, or
have one for each kind of layer."""


STYLES = [(n, style) for n in MODEL_TYPES for style in "45" if n not in ONLY_FIVE or style == "5"]


@pytest.mark.parametrize(("model_type", "style"), STYLES)
def test_tiny_models_survive_save_pretrained(model_type: str, style: Any, tmp_path: Path) -> None:
    model = tiny(model_type, seed=1)
    save_hf(model, tmp_path, max_shard_size="100KB", config_style=style)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert ("torch_dtype" in json.loads((tmp_path / "config.json").read_text())) == (style == "4")
    # Version 4 spells experts and RoPE differently, and version 5 must read both.
    read = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, read(TOKENS).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_tensor_of_a_tiny_model_is_constant(model_type: str) -> None:
    for key, tensor in tiny(model_type).state_dict().items():
        assert tensor.unique().numel() > tensor.numel() // 2, key


def test_pth_of_the_first_generations_shares_the_tied_storage(tmp_path: Path) -> None:
    model = randomise(MiniMind(MiniMindConfig(generation="gen1", mask=True)))
    save_pth(model, tmp_path / "pretrain_96.pth")
    state = torch.load(tmp_path / "pretrain_96.pth", weights_only=True)
    assert state["tok_embeddings.weight"].data_ptr() == state["output.weight"].data_ptr()
    assert state["output.weight"].dtype == torch.float32
    assert state["layers.2.attention.mask"].shape == (1, 1, 64, 64)


def test_pth_of_the_later_generations_is_half_and_untangled(tmp_path: Path) -> None:
    model = randomise(MiniMind(MiniMindConfig(generation="gen3")))
    save_pth(model, tmp_path / "pretrain_96.pth")
    state = torch.load(tmp_path / "pretrain_96.pth", weights_only=True)
    embed, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    assert embed.data_ptr() != head.data_ptr()
    assert torch.equal(embed, head)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
