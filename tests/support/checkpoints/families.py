"""What the tests of naming families share: reading results with stock tools, and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from support.models.layers import random_tokens

RIGHT = 1e-4
"""Largest |logit difference| of equal models in fp32; the logits' standard deviation is about 1."""

TOKENS = random_tokens(131)


def hf_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory of safetensors, read by the safetensors package."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def torch_tensors(file: Path) -> dict[str, Tensor]:
    """A ``torch.save`` file, read by torch without trust."""
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


def load_hf(directory: Path) -> Any:
    """The model in ``directory`` as transformers makes it from config.json and tensors."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return model.eval()


def logits(model: Any) -> Tensor:
    """Logits of ``TOKENS``, from our reference models or from transformers'."""
    with torch.no_grad():
        found = model(TOKENS)
    return torch.as_tensor(getattr(found, "logits", found))


def difference(left: Any, right: Any) -> float:
    """Largest |logit difference| of two models."""
    return float((logits(left) - logits(right)).abs().max())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same keys with the same types and bits."""
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
