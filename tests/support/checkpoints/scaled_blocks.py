"""Matrices in scaled blocks, as DeepSeek publishes them, and what its own code makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoints.families import hf_tensors
from support.models.hf_models import save_hf, tiny

BLOCK = (24, 40)
"""Not square, no divisor of most sizes, so that blocks at the edges are cut short, and no multiple
of a head's 16 rows, so that blocks cut through heads."""


def quantised(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """fp8 elements and fp32 factors."""
    down, across = block
    rows, columns = weight.shape
    factors = torch.zeros(-(-rows // down), -(-columns // across))
    stored = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            place = (slice(i * down, (i + 1) * down), slice(j * across, (j + 1) * across))
            factors[i, j] = weight[place].abs().max() / 448.0
            stored[place] = (weight[place] / factors[i, j]).to(torch.float8_e4m3fn)
    return stored, factors


def multiplied_out(
    stored: Tensor,
    factors: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    block: tuple[int, int] = BLOCK,
) -> Tensor:
    """``weight_dequant`` of DeepSeek-V3, in torch."""
    down, across = block
    wide = factors.float().repeat_interleave(down, 0).repeat_interleave(across, 1)
    return (stored.float() * wide[: stored.shape[0], : stored.shape[1]]).to(dtype)


def published(
    directory: Path, model_type: str = "deepseek_v3", **overrides: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A tiny model in fp8, and what its tensors are worth in fp32."""
    source = save_hf(tiny(model_type, **overrides), directory / "plain")
    made, worth = {}, {}
    for key, tensor in hf_tensors(source).items():
        if tensor.dim() == 2 and ".layers." in key and "mlp.gate." not in key:
            made[key], factors = quantised(tensor)
            made[f"{key}_scale_inv"] = factors
            worth[key] = multiplied_out(made[key], factors)
        else:
            made[key] = worth[key] = tensor
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": list(BLOCK),
    }
    (directory / "fp8").mkdir()
    (directory / "fp8" / "config.json").write_text(json.dumps(fields))
    return rewrite(directory / "fp8", made), worth


def rewrite(directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Other tensors beside the same config; returns ``directory``."""
    save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
    return directory
