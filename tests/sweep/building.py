"""Tiny models of any architecture: every config class, with its numbers shrunk by their names.

Nothing here knows a model.  A config is made with fields shrunk in several ways, from careful to
bold, until its class builds a model that is small enough; what no way builds is skipped with the
reason that the last of them gave.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

LARGEST = 70_000_000
"""Elements of a model that still counts as tiny."""

HEADS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CTC",
    "MASKED_LM",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "MASK_GENERATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "IMAGE_TO_IMAGE",
    "KEYPOINT_DETECTION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "TIME_SERIES_PREDICTION",
    "PRETRAINING",
)
"""Heads, the most telling first; an architecture without any of them is its base model."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One ``model_type`` and the class that is built of it.

    Attributes:
        model_type: As in ``config.json``.
        config: Name of its config class.
        model: Name of the class.
        base: Name of the class without a head, or ``""``.
        kind: What its head does: ``CAUSAL_LM``, or ``BASE``.
    """

    model_type: str
    config: str
    model: str
    base: str
    kind: str


@dataclass(frozen=True, slots=True)
class Shrinking:
    """One way to make numbers small.

    Attributes:
        width: Of hidden layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        image: Pixels across a picture; 0 leaves picture sizes alone.
        is_thorough: Whether more than layers, vocabulary and experts shrink.
    """

    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    image: int = 32
    is_thorough: bool = True


WAYS = (
    Shrinking(),
    Shrinking(kv_heads=4),
    Shrinking(kv_heads=4, image=0),
    Shrinking(width=96, heads=6, kv_heads=6),
    Shrinking(width=128, heads=4, kv_heads=4, image=64),
    Shrinking(is_thorough=False),
)


class CannotBuildError(Exception):
    """No way of shrinking leads to a model."""


def architectures() -> Iterator[Architecture]:
    """Every ``model_type`` that an auto class knows a model for."""
    tables = {head: getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in HEADS}
    for model_type, config in configuration_auto.CONFIG_MAPPING_NAMES.items():
        base = _one(modeling_auto.MODEL_MAPPING_NAMES.get(model_type, ""))
        found = next(
            (
                (head, _one(table[model_type]))
                for head, table in tables.items()
                if model_type in table
            ),
            ("BASE", base),
        )
        if found[1]:
            yield Architecture(model_type, config, found[1], base, found[0])


def _one(names: Any) -> str:
    return names if isinstance(names, str) else str(names[0])


def class_of(name: str) -> Any:
    """A class that transformers exports.

    Raises:
        CannotBuildError: It needs something that is not installed, or is not there.
    """
    try:
        found = getattr(importlib.import_module("transformers"), name)
    except (AttributeError, ImportError) as error:
        raise CannotBuildError(f"transformers has no {name}: {error}") from None
    backends = getattr(found, "_backends", None)
    if backends:
        raise CannotBuildError(f"needs {', '.join(backends)}")
    return found


def build(one: Architecture, seed: int = 0) -> Any:
    """A tiny model in eval mode.

    Raises:
        CannotBuildError: With the reason of the last way that was tried.
    """
    model = class_of(one.model)
    config_class = class_of(one.config)
    reason = ""
    for way in WAYS:
        try:
            numel = _numel(model, shrunk(config_class, way))
            if numel > LARGEST:
                reason = reason or f"no smaller than {numel:,} elements"
                continue
            torch.manual_seed(seed)
            return model(shrunk(config_class, way)).eval()
        except CannotBuildError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a config or model does not like
            said = " ".join(str(error).split())
            reason = f"{type(error).__name__}: {said[:160]}"
    raise CannotBuildError(reason)


def _numel(model: Any, config: Any) -> int:
    """Elements of a model, counted without memory where its class allows that."""
    try:
        with torch.device("meta"):
            made = model(config)
            return sum(t.numel() for t in (*made.parameters(), *made.buffers()))
    except TypeError:  # torch.empty() with a dtype by position
        return 0


def shrunk(config_class: type, way: Shrinking) -> Any:
    """A config with small numbers, in its parts too."""
    return config_class(**_fields(config_class, way))


def _fields(config_class: Any, way: Shrinking) -> dict[str, Any]:
    try:
        default = config_class()
    except Exception:  # noqa: BLE001 - some are made of parts only
        default = None
    parts = getattr(config_class, "sub_configs", {}) or {}
    values = dict(vars(default)) if default is not None else {}
    fields: dict[str, Any] = {}
    for name, kind in parts.items():
        part = values.pop(name, None)
        used = type(part) if isinstance(part, PreTrainedConfig) else _named(kind)
        if used is not None and used is not PreTrainedConfig and name != "generation_config":
            fields[name] = {**_fields(used, way), "model_type": used.model_type}
    names = {name for name in values if not name.startswith("_")}
    heads, width = way.heads, way.width
    for name in names:
        value = values[name]
        small = _small(name, value, way, heads, width)
        if small is not None:
            fields[name] = small
    return fields


def _named(kind: Any) -> Any:
    if isinstance(kind, type) and kind.__name__ != "AutoConfig":
        return kind
    return None


_SKIPPED = re.compile(
    r"^(transformers_version|model_type|architectures|id2label|label2id|problem_type|torch_dtype|"
    r"dtype|return_dict|output_.*|num_feat_extract_layers|use_bfloat16|chunk_size_feed_forward|attn_implementation)$"
)
_LAYERS = re.compile(r"(^|_)(num_.*layers|n_layers?|layers|depth|num_blocks|n_blocks|.*_layers)$")
_WIDTHS = re.compile(
    r"^(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|projection_dim|hidden_dim|"
    r"emb_dim|model_dim|out_hidden_size|text_embed_dim|d_embed|attention_hidden_size)$"
)
_FFN = re.compile(
    r"(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim|dim_feedforward)"
)
_HEADS = re.compile(
    r"^(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|"
    r"decoder_attention_heads|attention_heads)$"
)
_KV = re.compile(r"^(num_key_value_heads|n_kv_heads|multi_query_group_num)$")
_HEAD_DIM = re.compile(
    r"^(head_dim|d_kv|d_head|attention_head_dim|qk_nope_head_dim|v_head_dim|"
    r"qk_rope_head_dim|swa_head_dim)$"
)
_RANKS = re.compile(r"(lora_rank|_rank)$")
_EXPERTS = re.compile(r"(num_.*experts|n_routed_experts|moe_num_experts|num_experts)$")
_TOPK = re.compile(r"(experts_per_tok|experts_per_token|top_k|topk|moe_k|num_selected_experts)$")
_POSITIONS = re.compile(
    r"(max_position_embeddings|n_positions|max_source_positions|"
    r"max_target_positions|max_sequence_length|seq_length)$"
)
_IMAGE = re.compile(r"^(image_size|img_size)$")
_VOCAB = re.compile(r"vocab")
_CHUNK = re.compile(r"chunk_size$")
_CHUNKS = 16
"""Positions that a state space takes at a time; more only cost time."""
_TOKENS = re.compile(r"(_token_id|_token_index|_token_ids|_id)$")


def _small(name: str, value: Any, way: Shrinking, heads: int, width: int) -> Any:
    """A smaller value for a field; ``None`` to leave it to its class."""
    if name == "vocab_size" and value is None:
        return 300
    if _SKIPPED.match(name) or value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return _small_int(name, value, way, heads, width)
    if isinstance(value, Mapping) and way.is_thorough and "mrope_section" in value:
        half = width // heads // 2
        return {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return None


def _small_int(name: str, value: int, way: Shrinking, heads: int, width: int) -> int | None:
    if _VOCAB.search(name) and value > 300:
        return 300
    if _TOKENS.search(name) and value >= 300:
        return 3 + sum(map(ord, name)) % 200
    if _EXPERTS.search(name) and value > 4:
        return 4
    if _TOPK.search(name) and value > 2:
        return 2
    if _LAYERS.search(name) and value > 2:
        return 2
    if _CHUNK.search(name) and value > _CHUNKS:
        return _CHUNKS
    if not way.is_thorough:
        return None
    rules = (
        (_KV, way.kv_heads),
        (_HEADS, heads),
        (_WIDTHS, width),
        (_HEAD_DIM, width // heads),
        (_FFN, 3 * width // 2),
        (_RANKS, width // heads),
        (_POSITIONS, 128),
        (_IMAGE, way.image),
    )
    for pattern, small in rules:
        if pattern.search(name) and small and value > small:
            return small
    return None
