"""Adapters as PEFT and MiniMind save them, and what merging them should give, in torch alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."


def factors(
    weights: Mapping[str, Tensor], modules: Iterable[str], rank: int = 4, seed: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """Random ``(A, B)`` for every matrix whose module has one of the names, by module."""
    generator = torch.Generator().manual_seed(seed)
    names = set(modules)
    made = {}
    for key, weight in weights.items():
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in names and weight.dim() == 2:
            a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            made[module] = (a, b)
    assert made
    return made


def peft_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]], name: str = "") -> dict[str, Tensor]:
    """The keys of PEFT, with the name of the adapter in them as in a live model, or without."""
    between = f".{name}" if name else ""
    made = {}
    for module, (a, b) in pairs.items():
        made[f"{PREFIX}{module}.lora_A{between}.weight"] = a
        made[f"{PREFIX}{module}.lora_B{between}.weight"] = b
    return made


def config(**fields: Any) -> dict[str, Any]:
    """``adapter_config.json`` with rank 4 and alpha 10."""
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | fields


def save_peft(
    directory: Path, tensors: Mapping[str, Tensor], *, is_bin: bool = False, **fields: Any
) -> Path:
    """A PEFT directory."""
    directory.mkdir(parents=True)
    if is_bin:
        torch.save(dict(tensors), directory / "adapter_model.bin")
    else:
        save_file(dict(tensors), directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config(**fields)))
    return directory


def merged(
    weights: Mapping[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    scale: float = 2.5,
) -> dict[str, Tensor]:
    """``W + scale * B @ A`` in fp32, rounded once."""
    made = dict(weights)
    for module, (a, b) in pairs.items():
        weight = weights[f"{module}.weight"]
        made[f"{module}.weight"] = (weight.float() + (b @ a) * scale).to(weight.dtype)
    return made


def assert_near(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Equal to a unit in the last place of each value, or of 1/8 where values are smaller."""
    assert sorted(found) == sorted(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        unit = torch.finfo(value.dtype).eps * value.float().abs().clamp_min(0.125)
        away = float(((found[key].float() - value.float()).abs() / unit).max())
        assert away <= 1, (key, away)
        assert not math.isnan(away), key
