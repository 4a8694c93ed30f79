"""``adapter_config.json``: every field used, harmless for a stated reason, or refused by name.

Source: peft 0.21.2 ``tuners/lora/config.py``, ``utils/peft_types.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcpconv.core.errors import FormatError, NotExpressibleError

CONFIG = "adapter_config.json"

_LARGEST = 16 << 20
"""Bytes; no config comes near."""

_USED = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("fan_in_fan_out", "use_dora", "lora_bias", "target_parameters", "init_lora_weights"),
        *("base_model_name_or_path", "modules_to_save", "ensure_weight_tying"),
    }
)

_HARMLESS = frozenset(
    {
        # who trained what, and how
        *("task_type", "revision", "auto_mapping", "inference_mode", "peft_version"),
        *("lora_dropout", "runtime_config", "megatron_config", "megatron_core", "bias"),
        # which modules: the tensors say so themselves
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # how A and B began; what changes the base with them is refused by init_lora_weights
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    }
)

_OTHERWISE = "merge it with PEFT, which changes the base as the training began"

_INITS = {
    "pissa": "the base was changed when training began (PiSSA)",
    "olora": "the base was changed when training began (OLoRA)",
    "corda": "the base was changed when training began (CorDA)",
    "loftq": "the base was quantized when training began (LoftQ)",
    "lora_ga": "the base was changed when training began (LoRA-GA)",
}
"""Values of ``init_lora_weights`` with which ``W + s * B @ A`` is not what was trained."""

_REASONS = {
    "alora_invocation_tokens": "the adapter acts only after certain tokens",
    "use_qalora": "its inputs are averaged in groups",
    "layer_replication": "the adapter's model has other layers than the base",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it chooses between adapters for every token",
    "velora_config": "its factors are changed by VeLoRA",
    "monteclora_config": "its factors are drawn at random",
    "kasa_config": "the base was cut when training began (KaSA)",
    "trainable_token_indices": "single rows of the embedding were trained",
}


@dataclass(frozen=True, slots=True)
class LoraFields:
    """What of the config bears on a merge."""

    rank: int
    alpha: float
    is_rs: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    is_dora: bool = False
    parameters: tuple[str, ...] = ()
    base: str = ""
    keeps_ties: bool = False

    def rank_of(self, module: str) -> int:
        """Ranks of a module."""
        return self.ranks.get(_pattern(self.ranks, module), self.rank)

    def scale_of(self, module: str) -> float:
        """Factor on the product of a module."""
        alpha = self.alphas.get(_pattern(self.alphas, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.is_rs else alpha / rank


def read_config(file: Path) -> dict[str, Any]:
    """The fields of an adapter's config.

    Raises:
        FormatError: It cannot be read, or is no object.
    """
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is larger than any config")
        fields = json.loads(file.read_bytes())
        if not isinstance(fields, dict):
            raise TypeError("it is no JSON object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(
            "the adapter's config cannot be read", [("file", file), ("because", error)]
        ) from None
    return fields


def lora_fields(fields: Mapping[str, Any], *, file: Path) -> LoraFields:
    """What the config says of a merge.

    Raises:
        NotExpressibleError: It is no LoRA, or of a kind that is no ``W + s * B @ A``; all reasons
            are listed.
        FormatError: A field has no sense.
    """
    kind = str(fields.get("peft_type", ""))
    if kind != "LORA":
        raise NotExpressibleError(
            f"an adapter of the kind {kind or 'that no one names'} cannot be merged",
            [("adapter", file.parent), ("peft_type", kind), ("expected", "LORA")],
            hint="only low-rank matrices can be added to the base's; use it with PEFT",
        )
    refused = [("refused", f"{name}: {why}") for name, why in _refusals(fields)]
    if refused:
        raise NotExpressibleError(
            "this adapter is more than W + s * B @ A and cannot be merged",
            [("adapter", file.parent), *refused],
            hint=_OTHERWISE,
        )
    wrong: list[tuple[str, object]] = []
    ranks = _numbers(fields, "rank_pattern", wrong)
    alphas = _numbers(fields, "alpha_pattern", wrong)
    rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    for name, value in (("r", rank), *(("rank_pattern", value) for value in ranks.values())):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            wrong.append((name, f"{value!r} is no number of ranks"))
    if not _is_number(alpha):
        wrong.append(("lora_alpha", f"{alpha!r} is no number"))
    parameters = fields.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        wrong.append(("target_parameters", f"{parameters!r} is no list of names"))
    if wrong:
        raise FormatError("the adapter's config has no sense", [("file", file), *wrong])
    return LoraFields(
        rank=rank,
        alpha=alpha,
        is_rs=bool(fields.get("use_rslora")),
        ranks={name: int(value) for name, value in ranks.items()},
        alphas=alphas,
        fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
        is_dora=bool(fields.get("use_dora")),
        parameters=tuple(parameters),
        base=str(fields.get("base_model_name_or_path") or ""),
        keeps_ties=bool(fields.get("ensure_weight_tying")),
    )


def _refusals(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(name, why) for name, why in _REASONS.items() if fields.get(name)]
    init = fields.get("init_lora_weights")
    if isinstance(init, str):
        word = next((word for word in _INITS if init.lower().startswith(word)), None)
        if word is not None:
            found.append(("init_lora_weights", f"{init}: {_INITS[word]}"))
    known = _USED | _HARMLESS | _REASONS.keys()
    found += [(name, "not known here") for name in fields if name not in known and fields[name]]
    return found


def _numbers(
    fields: Mapping[str, Any], name: str, wrong: list[tuple[str, object]]
) -> dict[str, float]:
    found = fields.get(name) or {}
    if not isinstance(found, dict):
        wrong.append((name, "is no object"))
        return {}
    good = {}
    for pattern, value in found.items():
        try:
            re.compile(pattern)
        except re.error as error:
            wrong.append((name, f"{pattern!r} is no pattern: {error}"))
            continue
        if not _is_number(value):
            wrong.append((name, f"{value!r} is no number"))
            continue
        good[pattern] = value
    return good


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pattern(patterns: Mapping[str, float], module: str) -> str:
    """The first pattern that a module's name, or the end of it after a dot, matches."""
    for pattern in patterns:
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return pattern
    return module
