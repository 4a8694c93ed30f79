"""Scenes for ``dist_worlds``: adapters merged into shards, each rank multiplying its own.

Run as a script by ``launch``; ``prepare`` writes what the scenes read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcpconv import convert
from dcpconv.loading.init_weights import load_init_weights
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.fp8_scenes import DTYPES, READS, WRAPS, Read
from support.worlds.sharded_models import Wrap, build, lingua_weights, local_tensors

MODULES = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
KINDS = ("plain", "dora")


def prepare(directory: Path) -> None:
    """Write a Llama, two adapters for it, and what one process makes of them."""
    from support.checkpoints.adapters import PREFIX, factors, peft_tensors, save_peft
    from support.checkpoints.families import hf_tensors
    from support.models.hf_models import save_hf, tiny

    base = save_hf(tiny("llama", tie_word_embeddings=False), directory / "base")
    weights = hf_tensors(base)
    pairs = factors(weights, MODULES)
    plain = peft_tensors(pairs)
    magnitudes = {
        f"{PREFIX}{module}.lora_magnitude_vector": weights[f"{module}.weight"].norm(dim=1) * 1.1
        for module in pairs
    }
    save_peft(directory / "plain", plain)
    save_peft(directory / "dora", plain | magnitudes, use_dora=True)
    for kind in KINDS:
        convert(base, directory / f"{kind}-merged", form="hf", adapter=directory / kind)
        merged = hf_tensors(directory / f"{kind}-merged")
        torch.save(merged, directory / f"{kind}.pt")


def _merges(kind: str, wrap: Wrap, dtype: torch.dtype, read: Read) -> Scene:
    def scene(directory: Path) -> Any:
        model = wrap(build(meta=False, dtype=dtype))
        load_init_weights(model, directory / "base", adapter=directory / kind, read=read)
        right = build(meta=False, dtype=dtype)
        weights = lingua_weights(torch.load(directory / f"{kind}.pt"))
        with torch.no_grad():
            for name, parameter in right.named_parameters():
                parameter.copy_(weights[name])
        right.rope_embeddings.reset_parameters()
        _equal(model, wrap(right))

    return scene


def _equal(model: nn.Module, right: nn.Module) -> None:
    found, expected = local_tensors(model), local_tensors(right)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype is tensor.dtype, key
        assert torch.equal(found[key], tensor), key


SCENES: dict[int, dict[str, Scene]] = {
    2: {
        f"{kind}/{name}/{label}/{read}": _merges(kind, wrap, dtype, read)
        for kind in KINDS
        for name, wrap in WRAPS.items()
        for label, dtype in DTYPES.items()
        for read in READS
    }
}

if __name__ == "__main__":
    take_part(SCENES)
