"""gpt-oss in MXFP4: multiplied out as transformers does, in files and in live models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dcpconv import convert
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import CoverageError
from dcpconv.engine.dequantise import Computed
from dcpconv.engine.tensors import memory
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader
from dcpconv.plan.coverage import Piece, Target
from dcpconv.plan.fills import fill_of
from dcpconv.sources.opening import open_source
from dcpconv.sources.scales import multiplied
from dcpconv.stores.local import Sources
from support.checkpoints.families import hf_tensors, torch_tensors
from support.checkpoints.gpt_oss import model, published
from support.checkpoints.stock import stock_load

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype is tensor.dtype, key
        assert bits(found[key]).equal(bits(tensor)), key


def bits(tensor: Tensor) -> Tensor:
    """What NaN is equal to itself in; all NaNs are one."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).contiguous()
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def every_code() -> tuple[Tensor, Tensor]:
    """All 16 codes, in the lower and in the upper half, under all 256 exponents."""
    low = torch.arange(16, dtype=torch.uint8)
    blocks = torch.stack([low | (15 - low) << 4] * 256)[None, :, None, :]
    return blocks.contiguous(), torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1)


@pytest.mark.parametrize("label", DTYPES)
def test_every_code_under_every_exponent(tmp_path: Path, label: str) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = every_code()
    save_file({"e.w_blocks": blocks, "e.w_scales": scales}, tmp_path / "in.safetensors")
    convert(
        tmp_path / "in.safetensors",
        tmp_path / "out",
        form="hf",
        dequantize=True,
        dtype=label,
        allow=("overflow",),
    )
    right = convert_moe_packed_tensors(blocks, scales, dtype=DTYPES[label])
    assert right.isfinite().sum() > 2000
    same(hf_tensors(tmp_path / "out"), {"e.w": right})


def test_the_result_is_the_unquantised_model(tmp_path: Path) -> None:
    source, worth = published(tmp_path / "in")
    report = convert(source, tmp_path / "out", form="hf", dequantize=True)
    same(hf_tensors(tmp_path / "out"), worth)
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in fields
    assert fields["dtype"] == "bfloat16"
    assert report.ignored == ()


def test_transformers_reads_the_result_as_it_reads_the_source(tmp_path: Path) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    source, _ = published(tmp_path / "in")
    convert(source, tmp_path / "out", form="hf", dequantize=True)
    found = GptOssForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    right = GptOssForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    same(found.state_dict(), right.state_dict())


@pytest.mark.parametrize("chunks", [1, 5])
def test_into_a_trainers_checkpoint(tmp_path: Path, chunks: int) -> None:
    source, worth = published(tmp_path / "in")
    convert(source, tmp_path / "dcp", dequantize=True, dtype="fp32", cast_all=True, chunks=chunks)
    expected = {key: tensor.float() for key, tensor in worth.items()}
    same(stock_load(tmp_path / "dcp", "dcp"), expected)


def test_blocks_inside_containers(tmp_path: Path) -> None:
    source, worth = published(tmp_path / "in")
    convert(source, tmp_path / "nested", root="model")
    convert(tmp_path / "nested", tmp_path / "out.pth", dequantize=True, root="model")
    found = torch.load(tmp_path / "out.pth")
    same(found["model"], worth)
    convert(source, tmp_path / "flat.pth", dequantize=True)
    same(torch_tensors(tmp_path / "flat.pth"), worth)


def test_without_being_asked_blocks_stay_as_they_are(tmp_path: Path) -> None:
    source, _ = published(tmp_path / "in")
    convert(source, tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf", assets=source)
    stored, back = hf_tensors(source), hf_tensors(tmp_path / "back")
    assert set(back) == set(stored)
    assert all(back[key].equal(tensor) for key, tensor in stored.items())


@pytest.mark.parametrize("label", ["bf16", "fp32"])
def test_a_live_model_gets_the_same(tmp_path: Path, label: str) -> None:
    source, worth = published(tmp_path / "in")
    live = model().to(DTYPES[label])
    load_init_weights(live, source, dequantize=True)
    same(live.state_dict(), {key: tensor.to(DTYPES[label]) for key, tensor in worth.items()})


def test_stock_dcp_load_of_a_part(tmp_path: Path) -> None:
    source, worth = published(tmp_path / "in")
    some = [key for key in worth if "layers.1" in key and "down_proj" in key]
    state: dict[str, Any] = {key: torch.zeros_like(worth[key]) for key in some}
    reader = CheckpointReader(source, dequantize=True)
    dcp_load(state, storage_reader=reader)
    same(state, {key: worth[key] for key in some})


@pytest.mark.parametrize("seed", range(20))
def test_any_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = random.Random(seed)
    monkeypatch.setattr("dcpconv.engine.cast.STEP", rng.choice([1, 37, 1000]))
    generator = torch.Generator().manual_seed(seed)
    shape = (*(rng.randint(1, most) for most in (4, 9, 3)), rng.choice([1, 3, 16]))
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, shape[:-1], generator=generator, dtype=torch.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "in.safetensors")
    right = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)

    catalog, scaled = multiplied(open_source(tmp_path / "in.safetensors").catalog)
    entry = catalog.tensors["w"]
    assert scaled.names == {"w": "w_scales"}
    assert entry.shape == right.shape
    offsets = tuple(rng.randrange(length) for length in right.shape)
    sizes = tuple(rng.randint(1, n - o) for n, o in zip(right.shape, offsets, strict=True))
    target = Target("w", entry.shape, BY_NAME["float32"], (Piece(entry),))
    fill = fill_of(target, offsets, sizes)
    made = torch.zeros(fill.numel)
    cut = rng.randint(0, fill.numel)
    with Sources.of(catalog) as sources:
        for start, stop in ((0, cut), (cut, fill.numel)):
            Computed(fill).read(
                start,
                stop,
                sources=sources,
                into=memory(made[start:stop]),
                scratch=lambda: memoryview(bytearray(16 << 10)),
            )
    box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    assert made.reshape(sizes).equal(right[box])


def test_openais_own_files_are_not_turned(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = every_code()
    stored = {"block.0.mlp.mlp1_weight.blocks": blocks, "block.0.mlp.mlp1_weight.scales": scales}
    save_file(stored, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", form="hf", dequantize=True)
    right = convert_moe_packed_tensors(blocks, scales).mT.contiguous()
    same(hf_tensors(tmp_path / "out"), {"block.0.mlp.mlp1_weight": right})


def test_exponents_that_do_not_fit_are_told(tmp_path: Path) -> None:
    source, _ = published(tmp_path / "in")
    file = source / "model-00002-of-00002.safetensors"
    scales = load_file(file)
    key = "model.layers.1.mlp.experts.down_proj_scales"
    scales[key] = scales[key][:, :, :-1].contiguous()
    save_file(scales, file)
    with pytest.raises(
        CoverageError, match=r"down_proj_scales  \[3, 64, 3\] expected, \[3, 64, 2\] found"
    ):
        convert(source, tmp_path / "out", form="hf", dequantize=True)
