"""fp8 weights with a factor per block: multiplied out as DeepSeek's own code does, or kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dcpconv import convert
from dcpconv.errors import CoverageError
from support.families import RIGHT, assert_same, difference, hf_tensors, load_hf, torch_tensors
from support.hf_models import save_hf, tiny

BLOCK = (24, 40)  # not square, and no divisor of most sizes: blocks at the edges are cut short


def quantised(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """fp8 elements and fp32 factors, as DeepSeek publishes them."""
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


def multiplied_out(stored: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight_dequant`` of DeepSeek-V3, in torch."""
    down, across = BLOCK
    wide = factors.repeat_interleave(down, 0).repeat_interleave(across, 1)
    return (stored.float() * wide[: stored.shape[0], : stored.shape[1]]).to(dtype)


def published(directory: Path, **overrides: Any) -> tuple[Path, dict[str, Tensor]]:
    """A tiny DeepSeek-V3 in fp8, and what its tensors are worth in fp32."""
    model = tiny("deepseek_v3", **overrides)
    source = save_hf(model, directory / "plain")
    made, worth = {}, {}
    for key, tensor in hf_tensors(source).items():
        if tensor.dim() == 2 and ".layers." in key and "mlp.gate." not in key:
            made[key], factors = quantised(tensor)
            made[f"{key}_scale_inv"] = factors
            worth[key] = multiplied_out(made[key], factors, torch.float32)
        else:
            made[key] = worth[key] = tensor
    (directory / "fp8").mkdir()
    save_file(made, directory / "fp8" / "model.safetensors", {"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": list(BLOCK),
    }
    (directory / "fp8" / "config.json").write_text(json.dumps(fields))
    return directory / "fp8", worth


@pytest.mark.parametrize(("dtype", "kind"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_blocks_are_multiplied_out_as_the_models_own_code_does(
    tmp_path: Path, dtype: str | None, kind: torch.dtype
) -> None:
    source, worth = published(tmp_path)
    convert(source, tmp_path / "out", form="hf", dequantize=True, dtype=dtype)
    stored = hf_tensors(source)
    expected = {
        key: tensor.to(kind) if f"{key}_scale_inv" in stored or dtype else tensor
        for key, tensor in worth.items()
    }
    assert_same(hf_tensors(tmp_path / "out"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_result_is_the_model(tmp_path: Path) -> None:
    source, worth = published(tmp_path)
    convert(source, tmp_path / "out", form="hf", dequantize=True, dtype="fp32")
    model = tiny("deepseek_v3")
    save_hf(model, tmp_path / "worth")
    save_file(worth, tmp_path / "worth" / "model.safetensors", {"format": "pt"})
    assert difference(load_hf(tmp_path / "out"), load_hf(tmp_path / "worth")) < RIGHT


def test_experts_are_stacked_on_the_way(tmp_path: Path) -> None:
    source, worth = published(tmp_path)
    convert(source, tmp_path / "live.pth", to="hf-memory", dequantize=True, dtype="fp32")
    found = torch_tensors(tmp_path / "live.pth")
    both = [
        torch.stack([worth[f"model.layers.1.mlp.experts.{e}.{name}_proj.weight"] for e in range(6)])
        for name in ("gate", "up")
    ]
    assert torch.equal(found["model.layers.1.mlp.experts.gate_up_proj"], torch.cat(both, 1))


def test_without_being_asked_everything_stays_as_it_is(tmp_path: Path) -> None:
    source, _ = published(tmp_path)
    convert(source, tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_what_would_tear_blocks_apart_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source, _ = published(tmp_path)
    with pytest.raises(CoverageError, match="dequantize the weights"):
        convert(source, tmp_path / "live.pth", to="hf-memory")


def test_factors_of_another_shape_are_told(tmp_path: Path) -> None:
    source, _ = published(tmp_path)
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"]["weight_block_size"] = [128, 128]
    (source / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CoverageError, match=r"_scale_inv  \[1, 1\] expected"):
        convert(source, tmp_path / "out", form="hf", dequantize=True)


def test_multi_token_prediction_stays_behind(tmp_path: Path) -> None:
    source, _ = published(tmp_path)
    stored = hf_tensors(source)
    extra = {
        key.replace("layers.2.", "layers.3."): tensor.clone()
        for key, tensor in stored.items()
        if "layers.2." in key
    }
    extra |= {
        f"model.layers.3.{name}": torch.ones(96)
        for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    }
    extra["model.layers.3.eh_proj.weight"] = torch.ones(96, 192)
    save_file(stored | extra, source / "model.safetensors", {"format": "pt"})
    report = convert(source, tmp_path / "live.pth", to="hf-memory", dequantize=True)
    assert {key for key, _ in report.ignored} == set(extra)
    assert not any("layers.3." in key for key in torch_tensors(tmp_path / "live.pth"))
