"""MiniMind's LoRA files as adapters: the logits of the model that carries it beside its weights.

The reference adds to every square projection what MiniMind's own ``apply_lora`` adds: ``B(A(x))``,
without a scale.  Source: jingyaogong/minimind ``model/model_lora.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcpconv import check, convert
from dcpconv.loading.init_weights import load_init_weights
from laws.test_families_minimind import config_json, minimind
from support.checkpoints.families import RIGHT, difference, load_hf
from support.models.minimind import MiniMind

GENERATIONS = {
    "gen1": "hf-llama",
    "gen2": "hf-llama",
    "gen3": "hf-llama",
    "gen4": "hf-qwen3",
}
RANK = 8


class Lora(nn.Module):
    """Two thin matrices beside a projection."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.A = nn.Linear(width, RANK, bias=False)
        self.B = nn.Linear(RANK, width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for matrix in (self.A.weight, self.B.weight):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.B(self.A(x)))


def with_lora(model: MiniMind) -> MiniMind:
    """The same model with a LoRA beside every square projection, as its forward passes see it."""
    square = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.in_features == module.out_features
    ]
    assert len(square) >= 6
    for seed, module in enumerate(square):
        module.lora = Lora(module.in_features, seed)
        module.register_forward_hook(lambda owner, given, made: made + owner.lora(given[0]))
    return model


def saved(model: MiniMind, directory: Path, prefix: str = "") -> tuple[Path, Path, Path]:
    """The base, its LoRA alone, and both in one file, as MiniMind leaves them."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(model.config)))
    state = model.state_dict()
    lora = {prefix + key: value for key, value in state.items() if ".lora." in key}
    base = {key: value for key, value in state.items() if ".lora." not in key}
    files = ("full_sft_96.pth", "lora_medical_96.pth", "checkpoint_lora_medical_96.pth")
    for name, tensors in zip(files, (base, lora, state), strict=True):
        torch.save(tensors, directory / name)
    one, two, three = (directory / name for name in files)
    return one, two, three


@pytest.mark.parametrize("prefix", ["", "module."], ids=["bare", "ddp"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_merged_model_has_the_logits_of_the_one_with_a_lora(
    tmp_path: Path, generation: Any, prefix: str
) -> None:
    model = with_lora(minimind(generation=generation))
    base, lora, whole = saved(model, tmp_path / "minimind", prefix)
    assert check(lora)
    assert check(lora, against=base)
    for adapter, out in ((lora, "alone"), (whole, "within")):
        to = GENERATIONS[generation]
        convert(base, tmp_path / out, form="hf", to=to, adapter=adapter)
        assert difference(load_hf(tmp_path / out), model) < RIGHT
    plain = minimind(generation=generation)
    assert difference(plain, model) > RIGHT

    load_init_weights(plain, base, adapter=lora)
    assert difference(plain, model) < RIGHT
