"""What the tests of naming families share: reading results with stock tools, logits, trips through
every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dcpconv import convert
from dcpconv.families.configs import read_spec
from dcpconv.families.keymaps import resolve_family
from dcpconv.sources.parameter_shapes import expected
from support.models.hf_models import save_hf
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


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same keys with the same types and bits."""
    assert sorted(found) == sorted(right)
    for key, tensor in right.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def assert_every_form_holds(model: Any, directory: Path, *, saved: str = "hf") -> None:
    """The same bits as hf (below ``hf`` and ``back``), and in memory as dcp and ``torch.save``.

    Args:
        model: A model of transformers.
        directory: Where all of that goes.
        saved: The naming in which transformers saves it.
    """
    source = save_hf(model, directory / "hf", max_shard_size="100KB")
    convert(source, directory / "dcp", form="dcp", to="hf-memory", root="model", chunks=3)
    convert(directory / "dcp", directory / "live.pth")
    live = torch.load(directory / "live.pth", weights_only=True)
    assert_same(live["model"], dict(model.state_dict()))

    convert(directory / "live.pth", directory / "back", form="hf", to=saved, assets=source)
    assert_same(hf_tensors(directory / "back"), hf_tensors(source))


def assert_config_says_every_key(model: Any, model_type: str, directory: Path) -> None:
    """The config alone tells the keys and shapes that the live model has."""
    model.config.save_pretrained(directory)
    spec = read_spec(directory)
    table = resolve_family("hf-memory", model_type)
    found = {key: shape for key, shape, _ in expected(table, spec)}
    real = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if spec.tied:
        del real["lm_head.weight"]
    assert found == real
