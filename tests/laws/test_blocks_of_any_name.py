"""Weights in scaled blocks under names that no table knows, multiplied out as torch does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from dcpconv import convert
from dcpconv.core.errors import CoverageError
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPES = {"net.q": (130, 200), "net.mlp.up": (257, 64), "head": (96, 384)}


def blocks_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def published(
    directory: Path, block: tuple[int, int], *, says: bool, index: bool = True
) -> dict[str, Tensor]:
    """Write an fp8 model that no table knows; returns what its tensors are worth, in fp32."""
    generator = torch.Generator().manual_seed(17)
    stored: dict[str, Tensor] = {"net.norm.weight": torch.rand(200, generator=generator)}
    worth = dict(stored)
    for name, (rows, columns) in SHAPES.items():
        weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        factors = torch.rand(blocks_of((rows, columns), block), generator=generator) + 0.5
        spread = factors.repeat_interleave(block[0], 0)[:rows]
        spread = spread.repeat_interleave(block[1], 1)[:, :columns]
        stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"] = weight, factors
        worth[f"{name}.weight"] = weight.float() * spread
    directory.mkdir()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    stated = {"quant_method": "fp8", **({"weight_block_size": list(block)} if says else {})}
    config = {"model_type": "mine", "quantization_config": stated}
    (directory / "config.json").write_text(json.dumps(config))
    if index:
        files = dict.fromkeys(stored, "model.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": files})
        (directory / "model.safetensors.index.json").write_text(text)
    return worth


BLOCKS = [
    pytest.param((128, 128), True, id="128-stated"),
    pytest.param((128, 128), False, id="128-by-default"),
    pytest.param((64, 32), True, id="64x32-stated"),
    pytest.param((64, 32), False, id="64x32-from-the-factors"),
    pytest.param((48, 40), True, id="48x40-stated"),
]


def zeros(worth: dict[str, Tensor]) -> dict[str, Any]:
    return {key: torch.zeros_like(tensor) for key, tensor in worth.items()}


@pytest.mark.parametrize(("block", "says"), BLOCKS)
def test_the_reader_multiplies_out(tmp_path: Path, block: tuple[int, int], says: bool) -> None:  # noqa: FBT001
    worth = published(tmp_path / "in", block, says=says)
    state = zeros(worth)
    load(state, storage_reader=CheckpointReader(tmp_path / "in", dequantize=True))
    for key, tensor in worth.items():
        assert torch.equal(state[key], tensor), key


def test_torch_own_reader_says_the_same(tmp_path: Path) -> None:
    worth = published(tmp_path / "in", (128, 128), says=True)
    ours, theirs = zeros(worth), zeros(worth)
    load(ours, storage_reader=CheckpointReader(tmp_path / "in", dequantize=True))
    load(theirs, storage_reader=QuantizedHuggingFaceStorageReader(str(tmp_path / "in")))
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def test_a_part_of_a_state_dict_is_multiplied_out(tmp_path: Path) -> None:
    worth = published(tmp_path / "in", (128, 128), says=True, index=False)
    state = {"head.weight": torch.zeros(96, 384, dtype=torch.bfloat16)}
    load(state, storage_reader=CheckpointReader(tmp_path / "in", dequantize=True))
    assert torch.equal(state["head.weight"], worth["head.weight"].bfloat16())


@pytest.mark.parametrize("form", ["hf", "dcp"])
@pytest.mark.parametrize(("block", "says"), BLOCKS)
def test_convert_multiplies_out(
    tmp_path: Path,
    form: Any,
    block: tuple[int, int],
    says: bool,  # noqa: FBT001
) -> None:
    worth = published(tmp_path / "in", block, says=says, index=False)
    convert(tmp_path / "in", tmp_path / "out", form=form, dequantize=True, dtype="fp32")
    convert(tmp_path / "out", tmp_path / "hf", form="hf")
    found = load_file(tmp_path / "hf/model.safetensors")
    assert set(found) == set(worth)
    for key, tensor in worth.items():
        assert torch.equal(found[key], tensor), key
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config


class Net(nn.Module):
    """A model that spells those names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {
                "q": nn.Linear(200, 130, bias=False),
                "norm": nn.RMSNorm(200),
                "mlp": nn.ModuleDict({"up": nn.Linear(64, 257, bias=False)}),
            }
        )
        self.head = nn.Linear(384, 96, bias=False)


@pytest.mark.parametrize("engine", ["direct", "torch"])
def test_a_live_model_gets_them_multiplied_out(tmp_path: Path, engine: Any) -> None:
    worth = published(tmp_path / "in", (64, 32), says=False, index=False)
    model = Net()
    load_init_weights(model, tmp_path / "in", dequantize=True, engine=engine)
    for key, tensor in model.named_parameters():
        assert torch.equal(tensor, worth[key]), key


def test_factors_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    published(tmp_path / "in", (128, 128), says=True, index=False)
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    with pytest.raises(CoverageError, match=r"head\.weight_scale_inv"):
        convert(tmp_path / "in", tmp_path / "out", form="hf", dequantize=True)


def test_a_number_of_factors_that_no_block_makes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    stored = {
        "a.weight": torch.ones(4, 6).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(3, 1),
    }
    save_file(stored, tmp_path / "in/model.safetensors")
    with pytest.raises(CoverageError, match=r"a\.weight_scale  \[1, 1\] expected, \[3, 1\] found"):
        convert(tmp_path / "in", tmp_path / "out", form="hf", dequantize=True)
