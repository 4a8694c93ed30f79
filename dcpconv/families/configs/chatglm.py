"""config.json of ChatGLM2, ChatGLM3 and GLM-4 in their own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dcpconv.core.dtypes import dtype_named
from dcpconv.core.errors import SpecError
from dcpconv.core.record import Record
from dcpconv.core.spec import Count, ModelSpec, Positive, Size
from dcpconv.families.configs.fields import unaccounted
from dcpconv.families.configs.parameters import (
    Refusal,
    Wishes,
    checked,
    turned_otherwise,
    unexpressed,
)

_EXPRESSES = frozenset({"partial_rotary", "qkv_bias"})
_BASE = 10_000.0
"""RoPE base that ``rope_ratio`` multiplies.  Source: ``modeling_chatglm.py``, RotaryEmbedding."""

_PREFIX = ("pre_seq_len", "prefix_projection")
"""Fields of a p-tuning prefix.  They mean nothing elsewhere and are carried along as they are."""

_AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}


_HARMLESS = (
    *("vocab_size", "bias_dropout_fusion", "apply_query_key_layer_scaling"),
    *("attention_softmax_in_fp32", "fp32_residual_connection", "interleaved_qkv"),
)
"""What the code does not read, or only to choose a precision; its scaling of queries is undone in
the softmax.  Source: ``modeling_chatglm.py`` of THUDM/chatglm3-6b, CoreAttention."""

_HARMLESS_IF: Mapping[str, tuple[object, ...]] = {
    "model_type": ("chatglm",),
    "original_rope": (True,),
    "quantization_bit": (0,),
}


class _Config(Record, extra="allow"):
    """ChatGLMConfig, with its defaults.

    Source: ``configuration_chatglm.py`` of THUDM/chatglm3-6b.
    """

    num_layers: Count = 28
    padded_vocab_size: Size = 65_024
    hidden_size: Size = 4096
    ffn_hidden_size: Size = 13_696
    kv_channels: Size = 128
    num_attention_heads: Count = 32
    seq_length: Size = 2048
    layernorm_epsilon: Positive = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    multi_query_attention: bool = False
    multi_query_group_num: Count = 1
    rope_ratio: Positive = 1.0
    tie_word_embeddings: bool = False
    torch_dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    pre_seq_len: Size | None = None
    prefix_projection: bool = False


def read(fields: Mapping[str, object], file: Path) -> ModelSpec:
    """The model that a ChatGLM config.json describes.

    Raises:
        SpecError: Facts list every field that does not fit.
    """
    config = checked(_Config, fields, file)
    if config.apply_residual_connection_post_layernorm or not config.post_layer_norm:
        raise SpecError(
            "a ChatGLM whose residuals or norms are placed otherwise than in ChatGLM2 and later",
            [("file", file)],
        )
    eos = config.eos_token_id
    heads = config.num_attention_heads
    grouped = config.multi_query_attention
    return checked(
        ModelSpec,
        {
            "architecture": "glm",
            "vocab_size": config.padded_vocab_size,
            "hidden_size": config.hidden_size,
            "n_layers": config.num_layers,
            "n_heads": heads,
            "n_kv_heads": config.multi_query_group_num if grouped else heads,
            "head_dim": config.kv_channels,
            "ffn_size": config.ffn_hidden_size,
            "norm_eps": config.layernorm_epsilon,
            "rope_theta": _BASE * config.rope_ratio,
            "partial_rotary_factor": 0.5,
            "max_seq_len": config.seq_length,
            "tied": config.tie_word_embeddings,
            "dtype": config.torch_dtype,
            "qkv_bias": config.add_qkv_bias or config.add_bias_linear,
            "o_bias": config.add_bias_linear,
            "mlp_bias": config.add_bias_linear,
            "norm": "rmsnorm" if config.rmsnorm else "layernorm",
            "qkv_per_head": not grouped,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
            "pad_token_id": config.pad_token_id,
            "origin": "chatglm3" if grouped else "chatglm3-mha",
            "extra": {name: fields[name] for name in _PREFIX if fields.get(name)},
            "unaccounted": unaccounted(
                config.model_extra or {}, harmless=_HARMLESS, harmless_if=_HARMLESS_IF
            ),
        },
        file,
    )


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What ChatGLM cannot hold of ``spec``."""
    found = unexpressed(spec, _EXPRESSES, name="ChatGLM")
    if spec.partial_rotary_factor != 0.5:
        found = [item for item in found if item.name != "partial_rotary"]
        reason = "ChatGLM turns the first half of each head"
        found.append(Refusal("partial_rotary", f"{spec.partial_rotary_factor}: {reason}"))
    else:
        found += turned_otherwise(spec, "glm", name="ChatGLM")
    if family == "chatglm3-mha" and spec.n_kv_heads != spec.n_heads:
        reason = "as many as heads without multi_query_attention"
        found.append(Refusal("n_kv_heads", f"{spec.n_kv_heads}: {reason}"))
    return tuple(found)


def write(family: str, spec: ModelSpec, wishes: Wishes) -> dict[str, object]:
    """config.json for ``spec``, in the order it should be printed."""
    eos = spec.eos_token_id
    known = dtype_named(wishes.dtype or spec.dtype or "fp16")
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": dict(_AUTO_MAP),
        "num_layers": spec.n_layers,
        "padded_vocab_size": spec.vocab_size,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_size,
        "kv_channels": spec.head_dim,
        "num_attention_heads": spec.n_heads,
        "multi_query_attention": family == "chatglm3",
        "multi_query_group_num": spec.n_kv_heads,
        "seq_length": spec.max_seq_len,
        "layernorm_epsilon": spec.norm_eps,
        "rope_ratio": spec.rope_theta / _BASE,
        "original_rope": True,
        "add_qkv_bias": spec.qkv_bias,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "fp32_residual_connection": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "classifier_dropout": None,
        "bias_dropout_fusion": True,
        "interleaved_qkv": False,
        "quantization_bit": 0,
        "use_cache": True,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": known.name if known else "float16",
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": spec.pad_token_id,
        **{name: spec.extra[name] for name in _PREFIX if name in spec.extra},
    }
