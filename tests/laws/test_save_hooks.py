"""The hooks of ``examples/save_hooks.py`` in the trainers they are for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from save_hooks import SaveAsHF, save_accelerated, save_every
from support.checkpoints.families import RIGHT, assert_same
from support.models.hf_models import save_hf, tiny
from support.models.layers import randomise
from support.models.torchtitan import Titan, TitanConfig

TOKENS = torch.arange(20)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(TOKENS)
    made: torch.Tensor = getattr(found, "logits", found)
    return made


def loaded(path: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(path))


class Tokens(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(index, index + 9)
        return {"input_ids": tokens, "labels": tokens}


def test_hf_trainer_writes_the_model_beside_its_checkpoints(tmp_path: Path) -> None:
    model = tiny("qwen3", tie_word_embeddings=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=Tokens(), callbacks=[SaveAsHF()]).train()

    for step in (2, 4):
        saved = load_file(tmp_path / f"hf-{step}/model.safetensors")
        assert_same(saved, load_file(tmp_path / f"checkpoint-{step}/model.safetensors"))
    right = logits(model)
    assert float((loaded(tmp_path / "hf-4") - right).abs().max()) < RIGHT
    assert float((loaded(tmp_path / "hf-2") - right).abs().max()) > RIGHT


def test_accelerate(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny("llama"))

    save_accelerated(accelerator, model, tmp_path / "hf")

    assert float((loaded(tmp_path / "hf") - logits(model)).abs().max()) < RIGHT


@pytest.mark.parametrize("parts", [1, 2])
def test_torchtitan(tmp_path: Path, parts: int) -> None:
    hf = save_hf(tiny("llama"), tmp_path / "assets")
    model: Any = Titan(TitanConfig())
    randomise(model)
    pieces = [model] if parts == 1 else [_Part(model, first=first) for first in (True, False)]
    config = SimpleNamespace(hf_assets_path=hf)
    trainer = SimpleNamespace(step=0, model_parts=pieces, config=config)

    for trainer.step in range(1, 5):
        save_every(trainer, steps=2, target=tmp_path)

    assert sorted(path.name for path in tmp_path.glob("hf-*")) == ["hf-2", "hf-4"]
    assert float((loaded(tmp_path / "hf-4") - logits(model)).abs().max()) < RIGHT


class _Part(torch.nn.Module):
    """The first layer, or everything else, as a stage of a pipeline holds it."""

    def __init__(self, model: Any, *, first: bool) -> None:
        super().__init__()
        layers = {key: layer for key, layer in model.layers.items() if (key == "0") == first}
        self.layers = torch.nn.ModuleDict(layers)
        if not first:
            for name, child in model.named_children():
                if name != "layers":
                    self.add_module(name, child)
