"""One record per family: its namings, its parameter file, and the order of its parameters.

What reads and writes a parameter file lies in ``configs`` and is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final

CONFIG: Final = "config.json"
PARAMS: Final = "params.json"


def _nobody(fields: Mapping[str, object]) -> bool:
    del fields
    return False


@dataclass(frozen=True, slots=True)
class Family:
    """What the tables of one family share.

    Attributes:
        names: What ``config`` of its tables says; one that ends in ``-`` stands for all that begin
            with it.
        module: In ``configs``; has ``refusals(name, spec)``.
        file: The parameter file that we write, by ``write(name, spec, wishes)`` of the module;
            ``None`` where we write none.
        recognises: Whether a parameter file with these fields is of this family; ``reader`` has
            then ``read(fields, file)``.
        reader: Module that reads, where it is not ``module``.
        names_tokenizer: Whether its file says where the tokenizer is.
        orders: Components of a module's children in the order they are registered, by table.
    """

    names: tuple[str, ...]
    module: str
    file: str | None = None
    recognises: Callable[[Mapping[str, object]], bool] = _nobody
    reader: str = ""
    names_tokenizer: bool = False
    orders: Mapping[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether a table with this ``config`` is of this family."""
        return any(
            name == own or (own.endswith("-") and name.startswith(own)) for own in self.names
        )

    @property
    def configs(self) -> Any:
        """The module that knows what the family can hold, and writes its file."""
        return import_module(f"dcpconv.families.configs.{self.module}")

    @property
    def reading(self) -> Any:
        """The module that reads its file."""
        return import_module(f"dcpconv.families.configs.{self.reader or self.module}")


def _is_llama4(fields: Mapping[str, object]) -> bool:
    """Meta's Llama 4 has its numbers alone, or in ``model``."""
    inner = fields.get("model", fields)
    return isinstance(inner, Mapping) and "dim" in inner and "ffn_exp" in inner


_HF_ORDER = (
    "model lm_head embed_tokens layers norm self_attn mlp input_layernorm post_attention_layernorm"
    " pre_feedforward_layernorm post_feedforward_layernorm q_proj k_proj v_proj o_proj qkv_proj"
    " q_norm k_norm gate_up_proj gate_proj up_proj down_proj weight bias"
)
_META_ORDER = (
    "tok_embeddings layers norm output attention attention_norm ffn_norm feed_forward"
    " wq wk wv wo experts gate shared_experts w1 w2 w3 weight"
)
_MINIMIND_ORDER = (
    "model lm_head embed_tokens layers norm self_attn input_layernorm post_attention_layernorm mlp"
    " q_proj k_proj v_proj o_proj q_norm k_norm {experts} gate_proj down_proj up_proj weight"
)
_CHATGLM_ORDER = (
    "transformer embedding word_embeddings encoder layers input_layernorm self_attention"
    " query_key_value dense post_attention_layernorm mlp dense_h_to_4h dense_4h_to_h"
    " final_layernorm output_layer prefix_encoder trans weight bias"
)

FAMILIES: Final = (
    Family(("meta-llama4",), "meta_llama4", PARAMS, _is_llama4),
    Family(
        ("lingua",),
        "lingua",
        PARAMS,
        lambda fields: isinstance(fields.get("model"), dict),
        names_tokenizer=True,
    ),
    Family(
        ("minimind1", "minimind2", "minimind3", "minimind4"),
        "minimind",
        CONFIG,
        lambda fields: fields.get("model_type") == "minimind",
        orders={
            "minimind1": _META_ORDER,
            "minimind2": _META_ORDER,
            "minimind3": _MINIMIND_ORDER.format(experts="experts gate shared_experts"),
            "minimind4": _MINIMIND_ORDER.format(experts="gate experts"),
        },
    ),
    Family(
        ("chatglm3", "chatglm3-mha"),
        "chatglm",
        CONFIG,
        lambda fields: fields.get("model_type") == "chatglm",
        orders=dict.fromkeys(("chatglm3", "chatglm3-mha"), _CHATGLM_ORDER),
    ),
    Family(("meta",), "meta", PARAMS, lambda fields: "dim" in fields and "n_layers" in fields),
    Family(
        (
            "torchtitan-llama3",
            "torchtitan-llama3-2025",
            "torchtitan-qwen3",
            "torchtitan-qwen3-2025",
            "torchtitan-deepseek_v3",
            "torchtitan-qwen3_5",
            "torchtitan-gpt_oss",
            "torchtitan-kimi_k2_7",
            "torchtitan-muse_glimmer",
        ),
        "torchtitan",
    ),
    Family(
        ("mamba_ssm",),
        "mamba_ssm",
        CONFIG,
        lambda fields: "d_model" in fields and "n_layer" in fields and "ssm_cfg" in fields,
    ),
    Family(
        ("hf", "hf-"),
        "hf_writing",
        CONFIG,
        lambda fields: "model_type" in fields or "architectures" in fields,
        reader="hf",
        orders=dict.fromkeys(
            ("hf-llama", "hf-qwen2", "hf-qwen3", "hf-phi3", "hf-gemma2", "hf-olmo2", "hf-glm"),
            _HF_ORDER,
        ),
    ),
)
"""A parameter file is of the first family that recognises it.

Source of the orders: jingyaogong/minimind@d65ef2c ``model/``; THUDM/chatglm3-6b
``modeling_chatglm.py``; transformers 5.23 ``models/*/modeling_*.py``."""


def family_of(name: str) -> Family | None:
    """The family of a table, by what its ``config`` says."""
    return next((family for family in FAMILIES if family.has(name)), None)


def family_of_fields(fields: Mapping[str, object]) -> Family | None:
    """The family whose parameter file has these fields."""
    return next((family for family in FAMILIES if family.recognises(fields)), None)


def parameter_orders() -> Mapping[str, str]:
    """Components of a module's children in the order they are registered, by table."""
    return {name: order for family in FAMILIES for name, order in family.orders.items()}
