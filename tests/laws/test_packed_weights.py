"""Weights that a tool has packed go through every form bit for bit, and load in it afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcpconv import check, convert
from dcpconv.core.errors import DcpconvError
from support.models.hf_models import save_hf, tiny
from support.versions import needs

WAYS = ("hf", "dcp", "torch")


def there_and_back(source: Path, work: Path, way: str) -> Path:
    back = work / "back"
    if way == "hf":
        convert(source, back, form="hf")
        return back
    there = work / ("there.pth" if way == "torch" else "there")
    convert(source, there, form=way)  # type: ignore[arg-type]  # one of the forms
    convert(there, back, form="hf", assets=source if way == "torch" else None)
    return back


def stored(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def said(directory: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= opened.metadata()
    return found


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found[key].contiguous().reshape(-1).view(torch.uint8), bits), key


def ints(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def gptq(rows: int, columns: int) -> dict[str, Tensor]:
    """Source: GPTQModel: eight numbers of four bits in an int32, groups of 16 along the inputs."""
    return {
        "qweight": ints((columns // 8, rows), torch.int32, 1),
        "qzeros": ints((columns // 16, rows // 8), torch.int32, 2),
        "scales": ints((columns // 16, rows), torch.float16, 3),
        "g_idx": torch.arange(columns, dtype=torch.int32) // 16,
    }


def awq(rows: int, columns: int) -> dict[str, Tensor]:
    """Source: AutoAWQ's gemm layout: eight outputs in an int32."""
    return {
        "qweight": ints((columns, rows // 8), torch.int32, 1),
        "qzeros": ints((columns // 16, rows // 8), torch.int32, 2),
        "scales": ints((columns // 16, rows), torch.float16, 3),
    }


def bitsandbytes(rows: int, columns: int) -> dict[str, Tensor]:
    """Source: bitsandbytes ``QuantState.as_dict(packed=True)``."""
    return {
        "weight": ints((rows * columns // 2, 1), torch.uint8, 1),
        "weight.absmax": ints((rows * columns // 64,), torch.uint8, 2),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.nested_absmax": torch.rand(1),
        "weight.nested_quant_map": torch.linspace(-1, 1, 256),
        "weight.quant_state.bitsandbytes__nf4": ints((90,), torch.uint8, 3),
    }


def nvfp4(rows: int, columns: int) -> dict[str, Tensor]:
    """Source: ModelOpt's NVFP4 export: pairs of four bits, a factor per 16 and one over all."""
    return {
        "weight": ints((rows, columns // 2), torch.uint8, 1),
        "weight_scale": ints((rows, columns // 16), torch.float8_e4m3fn, 2),
        "weight_scale_2": torch.tensor(0.5),
        "input_scale": torch.tensor(0.25),
    }


def mxfp4(rows: int, columns: int) -> dict[str, Tensor]:
    """The same with element types of their own for packed numbers and for exponents."""
    packed = ints((rows, columns // 2), torch.uint8, 1).view(torch.float4_e2m1fn_x2)
    return {
        "weight": packed,
        "weight_scale": ints((rows, columns // 32), torch.uint8, 2).view(torch.float8_e8m0fnu),
    }


def channels_fp8(rows: int, columns: int) -> dict[str, Tensor]:
    """Source: compressed-tensors' float-quantized: a factor per output channel."""
    return {
        "weight": ints((rows, columns), torch.float8_e4m3fn, 1),
        "weight_scale": ints((rows, 1), torch.bfloat16, 2),
        "input_scale": torch.tensor([0.5], dtype=torch.bfloat16),
    }


def pack_quantized(rows: int, columns: int) -> dict[str, Tensor]:
    """Source: compressed-tensors' pack-quantized: the shape is a tensor of its own."""
    return {
        "weight_packed": ints((rows, columns // 8), torch.int32, 1),
        "weight_scale": ints((rows, columns // 16), torch.bfloat16, 2),
        "weight_shape": torch.tensor([rows, columns]),
    }


TOOLS = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "modelopt": nvfp4,
    "mxfp4": mxfp4,
    "compressed-tensors": channels_fp8,
    "compressed-tensors-int4": pack_quantized,
}


_FP4 = needs("torch", "2.8", "float4_e2m1fn_x2")
OF_THIS_TORCH = [pytest.param(tool, marks=_FP4 if tool == "mxfp4" else ()) for tool in TOOLS]


def packed_llama(directory: Path, tool: str) -> Path:
    """A tiny llama whose projections are as a tool packs them."""
    save_hf(tiny("llama").bfloat16(), directory)
    tensors = {}
    for key, tensor in stored(directory).items():
        if not key.endswith("_proj.weight"):
            tensors[key] = tensor
            continue
        rows, columns = tensor.shape
        stem = key.removesuffix("weight")
        tensors |= {stem + name: part for name, part in TOOLS[tool](rows, columns).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": tool.removesuffix("-int4"), "bits": 4}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tool", OF_THIS_TORCH)
def test_packed_weights_come_back_bit_for_bit(tmp_path: Path, tool: str, way: str) -> None:
    source = packed_llama(tmp_path / "in", tool)
    back = there_and_back(source, tmp_path, way)
    assert_same_bits(stored(back), stored(source))
    assert json.loads((back / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert check(source)


@pytest.mark.parametrize("tool", OF_THIS_TORCH)
def test_packed_weights_have_no_other_names(tmp_path: Path, tool: str) -> None:
    source = packed_llama(tmp_path / "in", tool)
    with pytest.raises(DcpconvError) as refused:
        convert(source, tmp_path / "out", to="lingua")
    told = str(refused.value)
    assert re.search(r"layers\.0\.\S+_proj\.\w+", told), told
    assert not (tmp_path / "out").exists()


@_FP4
@pytest.mark.parametrize("way", WAYS)
def test_every_element_type_of_safetensors_comes_back(tmp_path: Path, way: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    bits = torch.arange(64, dtype=torch.uint8)
    names = """float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64
        float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2
        complex64"""
    tensors = {name: bits.clone().view(getattr(torch, name)) for name in names.split()}
    tensors |= {"bool": bits > 30, "matrix": tensors["float4_e2m1fn_x2"].view(4, 16).clone()}
    save_file(tensors, source / "model.safetensors")
    assert_same_bits(stored(there_and_back(source, tmp_path, way)), stored(source))


def test_complex_numbers_of_two_doubles_have_no_place_in_safetensors(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3, dtype=torch.complex128)}, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["w"]
    assert again.dtype is torch.complex128
    with pytest.raises(DcpconvError, match=r"w\s+complex128"):
        convert(tmp_path / "dcp", tmp_path / "out", form="hf")


ENTRIES = {
    "model.norm.weight": json.dumps({"_type": "Int8Tensor", "_data": {"block_size": [1, 32]}}),
    "tensor_names": json.dumps(["model.norm.weight"]),
    "note": "two\nlines, \u00e4",
}


def with_entries(directory: Path, entries: dict[str, str]) -> Path:
    save_hf(tiny("llama"), directory)
    metadata = {"format": "pt", **entries}
    save_file(stored(directory), directory / "model.safetensors", metadata=metadata)
    return directory


@pytest.mark.parametrize("way", WAYS)
def test_entries_of_metadata_survive(tmp_path: Path, way: str) -> None:
    source = with_entries(tmp_path / "in", ENTRIES)
    back = there_and_back(source, tmp_path, way)
    assert said(back) == {"format": "pt", **ENTRIES}
    assert not (back / "safetensors_metadata.json").exists()


def test_no_file_is_written_for_what_every_file_says(tmp_path: Path) -> None:
    convert(with_entries(tmp_path / "in", {}), tmp_path / "dcp")
    assert not (tmp_path / "dcp" / "safetensors_metadata.json").exists()


def test_entries_lie_beside_a_dcp_and_stay_there_from_dcp_to_dcp(tmp_path: Path) -> None:
    convert(with_entries(tmp_path / "in", ENTRIES), tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "again", form="dcp", chunks=2)
    for place in ("dcp", "again"):
        file = tmp_path / place / "safetensors_metadata.json"
        assert json.loads(file.read_text(encoding="utf-8")) == ENTRIES


def test_entries_of_several_files_are_united_without_loss(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number, name in enumerate("ab", 1):
        entries = {
            "tensor_names": json.dumps([name]),
            name: "mine",
            "all": json.dumps({name: number}),
            "part": f"{number} of 2",
        }
        file = source / f"model-0000{number}-of-00002.safetensors"
        save_file({name: torch.ones(number)}, file, metadata=entries)
    report = convert(source, tmp_path / "dcp", form="dcp")
    found = json.loads((tmp_path / "dcp" / "safetensors_metadata.json").read_text())
    assert found == {
        "tensor_names": '["a", "b"]',
        "a": "mine",
        "b": "mine",
        "all": '{"a": 1, "b": 2}',
        "part": "1 of 2",
    }
    (told,) = (note for note in report.notes if "__metadata__" in note)
    assert "differ in part" in told
    assert "model-00001-of-00002.safetensors says is kept" in told


def test_entries_stay_behind_where_names_change(tmp_path: Path) -> None:
    report = convert(with_entries(tmp_path / "in", ENTRIES), tmp_path / "out", to="lingua")
    assert any("3 entries of __metadata__" in note for note in report.notes)
    assert not (tmp_path / "out" / "safetensors_metadata.json").exists()


def test_a_file_that_is_no_such_file_is_said_and_not_used(tmp_path: Path) -> None:
    convert(with_entries(tmp_path / "in", ENTRIES), tmp_path / "dcp")
    (tmp_path / "dcp" / "safetensors_metadata.json").write_text("[1")
    report = convert(tmp_path / "dcp", tmp_path / "back", form="hf")
    assert any("safetensors_metadata.json cannot be read" in note for note in report.notes)
    assert said(tmp_path / "back") == {"format": "pt"}


@pytest.mark.parametrize("way", WAYS)
def test_torchao_loads_its_tensors_afterwards(tmp_path: Path, way: str) -> None:
    pytest.importorskip("torchao", reason="needs .[interop]")
    from torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
        unflatten_tensor_state_dict,
    )
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 32))
    quantize_(model, Int8WeightOnlyConfig(version=2))
    tensors, entries = flatten_tensor_state_dict(model.state_dict())
    source = tmp_path / "in"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata=entries)
    back = there_and_back(source, tmp_path, way)
    state, rest = unflatten_tensor_state_dict(stored(back), said(back))
    assert not rest
    fresh = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 32))
    fresh.load_state_dict(state, assign=True)
    sample = torch.randn(3, 32)
    assert torch.equal(fresh(sample), model(sample))


@pytest.mark.parametrize("way", WAYS)
def test_compressed_tensors_loads_its_model_afterwards(tmp_path: Path, way: str) -> None:
    pytest.importorskip("compressed_tensors", reason="needs .[interop]")
    from transformers import AutoModelForCausalLM

    source = tmp_path / "in"
    save_hf(tiny("llama").bfloat16(), source)
    tensors: dict[str, Any] = {}
    for key, tensor in stored(source).items():
        if key.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 448
            tensors[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[key + "_scale"] = scale.bfloat16()
        else:
            tensors[key] = tensor
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (source / "config.json").write_text(json.dumps(config))
    back = there_and_back(source, tmp_path, way)
    assert_same_bits(stored(back), stored(source))
    sample = torch.arange(2, 9)[None]
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(place)(sample).logits for place in (source, back)
        )
    assert torch.equal(found, expected)
