"""fp8 weights with a factor per block: multiplied out as DeepSeek's own code does, or kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpconv import convert
from dcpconv.core.errors import CoverageError, FormatError, LossyCastError
from lingua_model import LinguaModel
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.checkpoints.scaled_blocks import multiplied_out, published, rewrite
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp, stock_load
from support.versions import of_torch

WAYS = [
    pytest.param("llama", {"to": "lingua"}, id="rows of a head change places"),
    pytest.param("llama", {"to": "lingua", "chunks": 3}, id="chunks cut through heads"),
    pytest.param("llama", {"to": "meta", "model_parallel": 2}, id="columns cut in two"),
    pytest.param("llama", {"to": "torchtitan-llama3", "chunks": 5}, id="other keys, five chunks"),
    pytest.param("phi3", {"to": "lingua"}, id="fused matrices split"),
    pytest.param("mixtral", {"to": "hf-memory", "form": "dcp", "chunks": 3}, id="experts stacked"),
    pytest.param("qwen3_moe", {"to": "torchtitan-qwen3"}, id="stacked and relabelled"),
]


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
    plain = load_hf(rewrite(tmp_path / "plain", worth))
    assert difference(load_hf(tmp_path / "out"), plain) < RIGHT


def test_experts_are_stacked_on_the_way(tmp_path: Path) -> None:
    source, worth = published(tmp_path)
    convert(source, tmp_path / "live.pth", to="hf-memory", dequantize=True, dtype="fp32")
    found = torch_tensors(tmp_path / "live.pth")
    both = [
        torch.stack([worth[f"model.layers.1.mlp.experts.{e}.{name}_proj.weight"] for e in range(6)])
        for name in ("gate", "up")
    ]
    assert torch.equal(found["model.layers.1.mlp.experts.gate_up_proj"], torch.cat(both, 1))


def tensors_in(result: Path) -> dict[str, Tensor]:
    """Every tensor of a dcp directory, or of the torch files in one."""
    if (result / ".metadata").is_file():
        return stock_load(result, "dcp")
    return {
        f"{file.name} {key}": tensor
        for file in sorted(result.glob("*.pth"))
        for key, tensor in torch_tensors(file).items()
    }


@pytest.mark.parametrize("dtype", [None, "fp32"], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("model_type", "way"), WAYS)
def test_one_conversion_gives_the_bits_of_two(
    tmp_path: Path, model_type: str, way: dict[str, Any], dtype: str | None
) -> None:
    source, _ = published(tmp_path, model_type)
    convert(source, tmp_path / "one", dequantize=True, dtype=dtype, **way)

    convert(source, tmp_path / "between", form="hf", dequantize=True, dtype=dtype)
    convert(tmp_path / "between", tmp_path / "two", **way)
    expected = tensors_in(tmp_path / "two")
    assert len(expected) > 20
    assert_same_bits(tensors_in(tmp_path / "one"), expected)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_trainer_gets_the_model(tmp_path: Path, chunks: int) -> None:
    source, worth = published(tmp_path, "llama")
    convert(source, tmp_path / "lingua", to="lingua", dequantize=True, dtype="fp32", chunks=chunks)
    params = json.loads((tmp_path / "lingua/params.json").read_text())
    model = LinguaModel.from_params(params)
    state = flat(nested_of_dcp(tmp_path / "lingua"))
    model.load_state_dict({key.removeprefix("model."): state[key] for key in state}, strict=True)
    assert difference(model.eval(), load_hf(rewrite(tmp_path / "plain", worth))) < RIGHT


@pytest.mark.parametrize("kind", [of_torch("bfloat16"), of_torch("float8_e8m0fnu")])
def test_factors_may_be_of_any_floating_type(tmp_path: Path, kind: str) -> None:
    source, _ = published(tmp_path, "llama")
    stored = hf_tensors(source)
    factors = {
        key: tensor.to(getattr(torch, kind))
        for key, tensor in stored.items()
        if "_scale_inv" in key
    }
    rewrite(source, stored | factors)
    convert(source, tmp_path / "out", form="hf", dequantize=True, dtype="fp32")
    found = hf_tensors(tmp_path / "out")
    for key in (name.removesuffix("_scale_inv") for name in factors):
        assert torch.equal(found[key], multiplied_out(stored[key], factors[f"{key}_scale_inv"]))


def test_products_too_large_for_the_type_are_listed(tmp_path: Path) -> None:
    source, _ = published(tmp_path, "llama")
    stored = hf_tensors(source)
    key = "model.layers.1.self_attn.q_proj.weight"
    stored[f"{key}_scale_inv"] *= 1e6
    rewrite(source, stored)
    with pytest.raises(LossyCastError, match=r"layers\.1\.attention\.wq\.weight  \d+ values"):
        convert(source, tmp_path / "lingua", to="lingua", dequantize=True, dtype="fp16")


def test_matrices_stored_in_chunks_are_joined_first(tmp_path: Path) -> None:
    source, worth = published(tmp_path, "llama")
    convert(source, tmp_path / "dcp", chunks=3)
    with pytest.raises(
        FormatError, match=r"(?s)not stored in one piece.*into an hf directory first"
    ):
        convert(tmp_path / "dcp", tmp_path / "out", form="hf", dequantize=True, assets=source)

    convert(tmp_path / "dcp", tmp_path / "joined", form="hf", assets=source)
    convert(tmp_path / "joined", tmp_path / "out", form="hf", dequantize=True, dtype="fp32")
    assert_same(hf_tensors(tmp_path / "out"), worth)


def test_a_matrix_without_factors_does_not_join_those_with_them(tmp_path: Path) -> None:
    source, _ = published(tmp_path)
    stored = hf_tensors(source)
    del stored["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    rewrite(source, stored)
    with pytest.raises(CoverageError, match=r"different types: f8e4m3, f8e4m3 in scaled"):
        convert(source, tmp_path / "live.pth", to="hf-memory", dequantize=True)


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
    rewrite(source, stored | extra)
    report = convert(source, tmp_path / "live.pth", to="hf-memory", dequantize=True)
    assert {key for key, _ in report.ignored} == set(extra)
    assert not any("layers.3." in key for key in torch_tensors(tmp_path / "live.pth"))
