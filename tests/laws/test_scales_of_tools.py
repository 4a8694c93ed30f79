"""fp8 and other few bits, as the tools that wrote them make numbers of them again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dcpconv import convert
from dcpconv.core.errors import CoverageError
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader
from support.checkpoints.families import assert_same, hf_tensors
from support.checkpoints.scaled_blocks import published, rewrite
from support.versions import of_torch

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FP8 = torch.float8_e4m3fn


def every_code(columns: int = 256) -> Tensor:
    """Rows that hold all 256 codes, or as many as there is room for."""
    codes = torch.arange(256, dtype=torch.uint8).roll(3).view(FP8)
    return codes[None, :columns].expand(5, -1).contiguous()


def saved(directory: Path, stored: dict[str, Tensor], **config: Any) -> Path:
    """A directory of one file, and a config that says how its weights are quantised."""
    directory.mkdir()
    fields = {"model_type": "mine", "quantization_config": config} if config else {}
    (directory / "config.json").write_text(json.dumps({"model_type": "mine", **fields}))
    return rewrite(directory, stored)


def dequantised(source: Path, dtype: str | None = None) -> dict[str, Tensor]:
    out = source.parent / f"{source.name}.{dtype}"
    convert(
        source, out, form="hf", dequantize=True, dtype=dtype, cast_all=True, allow=("overflow",)
    )
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    return hf_tensors(out)


def same(found: Tensor, right: Tensor) -> None:
    assert found.dtype is right.dtype
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(found.nan_to_num(0.0, 9e9, -9e9), right.nan_to_num(0.0, 9e9, -9e9))


# ---- compressed-tensors: what ModelCompressor wrote, as its decompress() reads it


def compressed(preset: str, weight: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """What compressed-tensors stores of a weight, and what it makes of that again."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme(preset, ["Linear"])
    kinds = {
        "MXFP8": "mxfp8-quantized",
        "MXFP4": "mxfp4-pack-quantized",
        "INT8": "int-quantized",
    }
    kind = BaseCompressor.get_value_from_registry(kinds.get(preset, "float-quantized"))
    args = scheme.weights
    strategy = str(getattr(args.strategy, "value", args.strategy))
    rows, columns = weight.shape
    if strategy == "tensor":
        extremes = weight.reshape(1, -1)
    elif strategy == "channel":
        extremes = weight
    elif strategy == "block":
        down, across = args.block_structure
        padded = torch.zeros(-(-rows // down) * down, -(-columns // across) * across)
        padded[:rows, :columns] = weight
        tiles = padded.reshape(-1, down, padded.shape[1] // across, across).transpose(1, 2)
        extremes = tiles.reshape(tiles.shape[0], tiles.shape[1], -1)
    else:
        extremes = weight.reshape(rows, -1, args.group_size)
    low, high = extremes.amin(-1).float(), extremes.amax(-1).float()
    scale, _ = calculate_qparams(low, high, args)
    if strategy == "channel":
        scale = scale.reshape(rows, 1)
    scale = scale.reshape(1) if strategy == "tensor" else scale
    state = {"weight": weight.to(dtype), "weight_scale": scale.to(dtype)}
    stored = kind.compress(state, scheme)
    return stored, kind.decompress(dict(stored), scheme)["weight"]


SCHEMES = {
    "FP8": "tensor",
    "FP8_DYNAMIC": "channel",
    "FP8_BLOCK": "block",
    "MXFP8": "group",
    "MXFP4": "group",
    "INT8": "channel",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("preset", SCHEMES)
def test_as_compressed_tensors_decompresses(
    tmp_path: Path, preset: str, dtype: torch.dtype
) -> None:
    pytest.importorskip("compressed_tensors", reason="needs .[interop]")
    torch.manual_seed(11)
    columns = 192 if preset.startswith("MX") else 203
    weight = torch.randn(141, columns) * torch.rand(141, 1)
    stored, right = compressed(preset, weight, dtype)
    assert stored.get("weight", stored.get("weight_packed")).dtype.itemsize == 1  # type: ignore[union-attr]
    stored["input_scale"] = torch.ones(1)
    source = saved(
        tmp_path / "in",
        {f"layers.0.up.{name}": tensor.contiguous() for name, tensor in stored.items()},
        quant_method="compressed-tensors",
    )
    label = "bf16" if right.dtype is torch.bfloat16 else "fp32"
    found = dequantised(source, label)
    assert set(found) == {"layers.0.up.weight"}
    same(found["layers.0.up.weight"], right)


# ---- by hand: every code, every scale


@pytest.mark.parametrize("kind", [of_torch("uint8"), of_torch("float8_e8m0fnu")])
@pytest.mark.parametrize("label", ["bf16", "fp32"])
def test_mxfp8_all_codes_under_all_scales(tmp_path: Path, kind: str, label: str) -> None:
    weight = every_code().view(torch.uint8)[:1].expand(256, -1).contiguous().view(FP8)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 8).contiguous()
    scales = scales.view(getattr(torch, kind))
    source = saved(tmp_path / "in", {"a.weight": weight, "a.weight_scale": scales})
    exponents = torch.arange(256)[:, None] - 127
    right = torch.ldexp(weight.float(), exponents)
    if kind == "float8_e8m0fnu":
        right[255] = torch.nan
    dtype = torch.bfloat16 if label == "bf16" else torch.float32
    same(dequantised(source, label)["a.weight"], right.to(dtype))


FACTORS = [
    pytest.param((), id="0-d"),
    pytest.param((1,), id="one"),
    pytest.param((1, 1), id="one-by-one"),
    pytest.param((5,), id="rows"),
    pytest.param((5, 1), id="rows-by-one"),
    pytest.param((1, 256), id="columns"),
    pytest.param((5, 8), id="groups of 32"),
    pytest.param((1, 1, 2, 1), id="blocks with their reduced dims"),
]


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "qscale_weight", "scale"])
@pytest.mark.parametrize("shape", FACTORS)
def test_factors_of_any_shape_and_name(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    weight = every_code()
    factors = torch.rand(shape) + 0.1
    stored = {"a.weight": weight, f"a.{suffix}": factors, "b.weight": torch.ones(3)}
    source = saved(tmp_path / "in", stored, quant_method="fp8")
    grid = factors.reshape((shape[0], shape[2]) if len(shape) == 4 else shape)
    while grid.dim() < 2:
        grid = grid.unsqueeze(-1)
    wide = grid.repeat_interleave(-(-256 // grid.shape[1]), 1)
    found = dequantised(source, "fp32")
    assert set(found) == {"a.weight", "b.weight"}
    same(found["a.weight"], weight.float() * wide)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (3, 5), (3, 5, 1), (3, 2, 2)])
def test_factors_of_a_stack(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = torch.randn(3, 5, 33).to(FP8)
    factors = torch.rand(shape) + 0.1
    stored = {"experts.up": weight, "experts.up_scale": factors}
    config = {"weight_block_size": [3, 20]} if shape == (3, 2, 2) else {}
    source = saved(tmp_path / "in", stored, quant_method="fp8", **config)
    wide = factors.reshape((*shape, 1, 1)[:3])
    if config:
        wide = factors.repeat_interleave(3, 1)[:, :5].repeat_interleave(20, 2)[:, :, :33]
    same(dequantised(source, "fp32")["experts.up"], weight.float() * wide)


# ---- what speaks of activations alone, and what cannot be multiplied out


def model_optimizer() -> dict[str, Tensor]:
    """What Model Optimizer exports of two projections in fp8, with a cache in fp8."""
    stored: dict[str, Tensor] = {"norm.weight": torch.ones(7)}
    for name in ("q_proj", "k_proj"):
        key = f"layers.0.self_attn.{name}"
        stored[f"{key}.weight"] = torch.randn(5, 7).to(FP8)
        stored[f"{key}.weight_scale"] = torch.rand(())
        stored[f"{key}.input_scale"] = torch.rand(())
    stored["layers.0.self_attn.k_proj.k_scale"] = torch.rand(())
    return stored


def test_scales_of_activations_are_dropped_and_listed(tmp_path: Path) -> None:
    stored = model_optimizer()
    source = saved(tmp_path / "in", stored, quant_method="modelopt", quant_algo="FP8")
    (source / "hf_quant_config.json").write_text("{}")
    report = convert(source, tmp_path / "out", form="hf", dequantize=True)
    dropped = {key for key in stored if key.endswith(("input_scale", "k_scale"))}
    assert {key for key, _ in report.ignored} == dropped
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    right = {
        key: (tensor.float() * stored[f"{key}_scale"]).bfloat16() if tensor.dtype is FP8 else tensor
        for key, tensor in stored.items()
        if key.endswith(".weight")
    }
    assert_same(hf_tensors(tmp_path / "out"), right)


def test_a_model_and_a_part_of_one_get_the_products(tmp_path: Path) -> None:
    stored = model_optimizer()
    source = saved(tmp_path / "in", stored, quant_method="modelopt", quant_algo="FP8")
    key = "layers.0.self_attn.k_proj.weight"
    right = stored[key].float() * stored[f"{key}_scale"]
    state: dict[str, Any] = {key: torch.zeros(5, 7)}
    dcp_load(state, storage_reader=CheckpointReader(source, dequantize=True))
    assert torch.equal(state[key], right)

    live = nn.ModuleDict({"norm": nn.LayerNorm(7, bias=False)})
    layer = nn.ModuleDict({name: nn.Linear(7, 5, bias=False) for name in ("q_proj", "k_proj")})
    live["layers"] = nn.ModuleList([nn.ModuleDict({"self_attn": layer})])
    load_init_weights(live, source, dequantize=True)
    assert torch.equal(live.get_parameter(key), right)


def test_through_a_table_as_by_two_steps(tmp_path: Path) -> None:
    source, _ = published(tmp_path, "llama")
    stored: dict[str, Tensor] = {}
    for key, tensor in hf_tensors(source).items():
        if key.endswith("_scale_inv"):
            continue
        stored[key] = tensor
        if tensor.dtype is FP8:
            module = key.removesuffix("weight")
            stored[f"{module}weight_scale"] = torch.rand(tensor.shape[0], 1) + 0.5
            stored[f"{module}input_scale"] = torch.ones(())
    rewrite(source, stored)
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (source / "config.json").write_text(json.dumps(fields))
    convert(source, tmp_path / "between", form="hf", dequantize=True)
    convert(tmp_path / "between", tmp_path / "two", to="lingua")
    report = convert(source, tmp_path / "one", to="lingua", dequantize=True)
    assert len(report.ignored) == 21
    for name in ("one", "two"):
        convert(tmp_path / name, tmp_path / f"{name}.back", form="hf", to="hf")
    assert_same(hf_tensors(tmp_path / "one.back"), hf_tensors(tmp_path / "two.back"))


WORDS = torch.zeros(4, 4, dtype=torch.int32)
BYTES = torch.zeros(4, 8, dtype=torch.uint8)
REFUSED = [
    pytest.param(
        {"a.qweight": WORDS, "a.qzeros": WORDS.clone(), "a.scales": torch.ones(1, 4)}, "GPTQ or AWQ"
    ),
    pytest.param({"a.weight": BYTES, "a.weight.absmax": torch.ones(8)}, "4 bits of bitsandbytes"),
    pytest.param(
        {"a.weight": BYTES.view(torch.int8), "a.SCB": torch.ones(4)}, "8 bits of bitsandbytes"
    ),
    pytest.param({"a.weight_packed": WORDS, "a.weight_scale": torch.ones(4, 1)}, "packed integers"),
    pytest.param(
        {
            "a.weight": BYTES,
            "a.weight_scale": torch.ones(4, 1).to(FP8),
            "a.weight_scale_2": torch.ones(()),
        },
        "NVFP4 of Model Optimizer",
    ),
    pytest.param(
        {
            "a.weight_packed": BYTES,
            "a.weight_scale": torch.ones(4, 1).to(FP8),
            "a.weight_global_scale": torch.ones(()),
        },
        "NVFP4 of compressed-tensors",
    ),
    pytest.param(
        {
            "a.weight": BYTES.view(torch.int8),
            "a.weight_scale": torch.ones(4, 1),
            "a.weight_zero_point": torch.ones(4, 1, dtype=torch.int8),
        },
        "a.weight_zero_point  elements times factors would leave it out",
    ),
    pytest.param(
        {
            "a.weight": torch.ones(4, 6).to(FP8),
            "a.weight_scale": torch.ones(()),
            "b.weight": torch.ones(4, 6).to(FP8),
        },
        "b.weight  is stored as f8e4m3, and no factors are beside it",
    ),
    pytest.param(
        {"a.weight": torch.ones(4, 6).to(FP8), "a.weight_scale": torch.ones(3)},
        r"a.weight_scale  \[1, 1\] expected, \[3\] found",
    ),
]


@pytest.mark.parametrize(("stored", "words"), REFUSED)
def test_what_cannot_be_multiplied_out_is_refused_by_name(
    tmp_path: Path, stored: dict[str, Tensor], words: str
) -> None:
    source = saved(tmp_path / "in", {**stored, "norm.weight": torch.ones(3)}, quant_method="x")
    with pytest.raises(CoverageError, match=words):
        convert(source, tmp_path / "out", form="hf", dequantize=True)
    assert not (tmp_path / "out").exists()
    state: dict[str, Any] = {"norm.weight": torch.zeros(3)}
    with pytest.raises(CheckpointException) as caught:
        dcp_load(state, storage_reader=CheckpointReader(source, dequantize=True))
    assert re.search(words, str(caught.value.failures[0][0]))
    convert(source, tmp_path / "kept", form="hf")
    assert set(hf_tensors(tmp_path / "kept")) == {*stored, "norm.weight"}
