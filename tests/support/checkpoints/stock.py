"""Reads a checkpoint as everybody else would: with safetensors, torch and torch's DCP."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dcpconv.core.catalog import Form


def stock_load(path: Path, form: Form) -> dict[str, torch.Tensor]:
    """Every tensor, by its nested keys joined with dots."""
    if form == "hf":
        found: dict[str, torch.Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            found |= load_file(file)
        return found
    if form == "torch":
        return flat(torch.load(path, weights_only=True, mmap=True))
    return flat(nested_of_dcp(path))


def nested_of_dcp(path: Path) -> dict[str, object]:
    """What torch's own converter, and with it Lingua's consolidation, makes of a DCP."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "consolidated.pth")
        dcp_to_torch_save(path, file)
        loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


def flat(value: Mapping[str, object], prefix: str = "") -> dict[str, torch.Tensor]:
    """Nested dicts as one, tensors only."""
    found: dict[str, torch.Tensor] = {}
    for key, item in value.items():
        if isinstance(item, torch.Tensor):
            found[prefix + key] = item
        elif isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{key}.")
    return found


def assert_same_bits(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Same keys, types, shapes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        one, other = (
            t.detach().contiguous().flatten().view(torch.uint8) for t in (found[key], tensor)
        )
        assert torch.equal(one, other), key
