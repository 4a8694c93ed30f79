"""HF -> Lingua means the same model: equal logits, through files and stock readers only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoModelForCausalLM

from dcpconv import convert
from lingua_model import LinguaModel
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp
from support.models.hf_models import save_hf, tiny
from support.models.layers import random_tokens

RIGHT = 1e-4
"""Largest |logit difference| in fp32."""

CASES = [
    pytest.param("llama", {}, {}, id="gqa"),
    pytest.param("llama", {"num_key_value_heads": 6}, {}, id="mha"),
    pytest.param("llama", {"num_key_value_heads": 1}, {}, id="mqa"),
    pytest.param("llama", {"tie_word_embeddings": True}, {}, id="tied"),
    pytest.param("llama", {"head_dim": 24}, {}, id="explicit head_dim"),
    pytest.param("llama", {"rope_theta": 490000.0}, {}, id="rope theta"),
    pytest.param("llama", {}, {"max_shard_size": "60KB"}, id="sharded"),
    pytest.param("llama", {}, {"config_style": "4"}, id="transformers 4 config"),
    pytest.param("llama", {"num_hidden_layers": 11}, {}, id="eleven layers"),
    pytest.param("llama", {"intermediate_size": 97}, {}, id="narrow ffn"),
    pytest.param("mistral", {}, {}, id="mistral"),
    pytest.param("mistral", {"tie_word_embeddings": True}, {}, id="mistral tied"),
]


def through_dcp(directory: Path) -> LinguaModel:
    """A Lingua model loaded as Lingua does: params.json, then stock ``dcp.load`` in place."""
    model = LinguaModel.from_params(json.loads((directory / "params.json").read_text()))
    state = model.state_dict()
    load({"model": state}, checkpoint_id=directory)
    model.load_state_dict(state)
    return model.eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens)
    return torch.as_tensor(getattr(found, "logits", found))


@pytest.mark.parametrize(("model_type", "overrides", "saving"), CASES)
def test_the_converted_model_gives_the_same_logits(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], saving: dict[str, Any]
) -> None:
    hf = tiny(model_type, **overrides)
    source = save_hf(hf, tmp_path / "hf", **saving)
    tokens = random_tokens(131)

    convert(source, tmp_path / "lingua", to="lingua")

    difference = (logits(through_dcp(tmp_path / "lingua"), tokens) - logits(hf, tokens)).abs().max()
    assert float(difference) < RIGHT


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bf16_weights_arrive_bit_for_bit(tmp_path: Path, *, tied: bool) -> None:
    hf = tiny("llama", dtype=torch.bfloat16, tie_word_embeddings=tied)
    source = save_hf(hf, tmp_path / "hf")

    convert(source, tmp_path / "lingua", to="lingua")
    convert(tmp_path / "lingua", tmp_path / "back")

    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_same_bits(back.state_dict(), hf.state_dict())
    assert (
        json.loads((tmp_path / "lingua/params.json").read_text())["distributed"]["model_dtype"]
        == "bf16"
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lingua_consolidates_it_into_what_a_strict_load_takes(
    tmp_path: Path, *, tied: bool
) -> None:
    source = save_hf(tiny("llama", tie_word_embeddings=tied), tmp_path / "hf")

    convert(source, tmp_path / "lingua", to="lingua")

    nested = nested_of_dcp(tmp_path / "lingua")
    assert list(nested) == ["model"]
    model = LinguaModel.from_params(json.loads((tmp_path / "lingua/params.json").read_text()))
    state = nested["model"]
    assert isinstance(state, dict)
    model.load_state_dict(state, strict=True)
    assert_same_bits(flat(nested), {f"model.{k}": v for k, v in model.state_dict().items()})


def test_leaving_the_relabelling_out_would_show(tmp_path: Path) -> None:
    """The other tests could not pass by accident: the unrelabelled model is far off."""
    hf = tiny("llama")
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "lingua", to="lingua")
    model = through_dcp(tmp_path / "lingua")
    wrong = {
        key.replace(f"attention.w{letter}", f"self_attn.{letter}_proj"): key
        for key in model.state_dict()
        for letter in "qk"
        if f"attention.w{letter}." in key
    }
    with torch.no_grad():
        for theirs, ours in wrong.items():
            model.state_dict()[ours].copy_(hf.state_dict()[f"model.{theirs}"])

    tokens = random_tokens(131)
    assert float((logits(model, tokens) - logits(hf, tokens)).abs().max()) > 1e-2


def test_the_way_back_gives_the_logits_of_the_source(tmp_path: Path) -> None:
    hf = tiny("llama", rope_theta=490000.0, rms_norm_eps=1e-6)
    source = save_hf(hf, tmp_path / "hf", max_shard_size="60KB")
    convert(source, tmp_path / "lingua", to="lingua")

    convert(tmp_path / "lingua", tmp_path / "back")

    back, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokens = random_tokens(131)
    assert_same_bits(back.state_dict(), hf.state_dict())
    assert float((logits(back.eval(), tokens) - logits(hf, tokens)).abs().max()) < RIGHT


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    for _ in range(2):
        convert(source, tmp_path / "out", to="lingua", overwrite=True, jobs=3)
        now = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        first = locals().get("first", now)
        assert now == first
    assert str(tmp_path).encode() not in now[".metadata"]
