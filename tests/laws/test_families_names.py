"""Lingua, Meta and torchtitan: other names and RoPE layouts of Llama 3 and Qwen3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpconv import convert
from dcpconv.configs import read_spec
from dcpconv.keymaps import keymaps
from lingua_model import LinguaModel
from support.families import RIGHT, assert_same, difference, hf_tensors, torch_tensors
from support.hf_models import save_hf, tiny
from support.models.layers import pairs_from_halves

LLAMA_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
}


def titan(state: dict[str, Tensor], *, layers: int, today: bool, pairs: bool) -> dict[str, Tensor]:
    """torchtitan's state dict by hand, as its own ``from_hf`` makes it.

    Source: ``state_dict_adapter.py`` of its llama3 and qwen3 at b5bcd76 and 70592cb.
    """
    linear = "attention.qkv_linear." if today else "attention."
    made = {"lm_head.weight" if today else "output.weight": state["lm_head.weight"]}
    for ours, theirs in LLAMA_NAMES.items():
        for layer in range(layers) if "{}" in ours else (0,):
            if theirs.format(layer) in state:
                made[ours.format(layer)] = state[theirs.format(layer)]
    for layer in range(layers):
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        for name, heads in (("q", 6), ("k", 2), ("v", 0)):
            weight = state[f"{source}self_attn.{name}_proj.weight"]
            if pairs and heads:
                weight = pairs_from_halves(weight, heads)
            made[f"{target}{linear}w{name}.weight"] = weight
            if f"{source}self_attn.{name}_norm.weight" in state:
                made[f"{target}attention.{name}_norm.weight"] = state[
                    f"{source}self_attn.{name}_norm.weight"
                ]
        if f"{source}mlp.experts.gate_up_proj" in state:
            grouped = "moe.routed_experts.inner_experts." if today else "moe.experts."
            both = state[f"{source}mlp.experts.gate_up_proj"]
            half = both.shape[1] // 2
            names = ("w1_EFD", "w3_EFD", "w2_EDF") if today else ("w1", "w3", "w2")
            made[f"{target}moe.router.gate.weight"] = state[f"{source}mlp.gate.weight"]
            made[target + grouped + names[0]] = both[:, :half]
            made[target + grouped + names[1]] = both[:, half:]
            made[target + grouped + names[2]] = state[f"{source}mlp.experts.down_proj"]
    return made


TITANS = [
    pytest.param("llama", {}, "torchtitan-llama3", id="llama3"),
    pytest.param("llama", {"num_hidden_layers": 11}, "torchtitan-llama3-2025", id="llama3-2025"),
    pytest.param("llama", {"tie_word_embeddings": True}, "torchtitan-llama3", id="llama3-tied"),
    pytest.param("qwen3", {}, "torchtitan-qwen3", id="qwen3"),
    pytest.param("qwen3", {}, "torchtitan-qwen3-2025", id="qwen3-2025"),
    pytest.param("qwen3_moe", {"num_experts": 11}, "torchtitan-qwen3", id="qwen3-experts"),
    pytest.param("qwen3_moe", {}, "torchtitan-qwen3-2025", id="qwen3-experts-2025"),
]


@pytest.mark.parametrize(("model_type", "overrides", "family"), TITANS)
def test_torchtitan_names_there_and_back(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], family: str
) -> None:
    model = tiny(model_type, **overrides)
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "titan.pth", to=family)
    expected = titan(
        model.state_dict(),
        layers=model.config.num_hidden_layers,
        today=not family.endswith("2025"),
        pairs=model_type == "llama",
    )
    assert_same(torch_tensors(tmp_path / "titan.pth"), expected)
    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_load_balancing_of_torchtitan_stays_behind(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    source = save_hf(model, tmp_path / "hf")
    state = titan(model.state_dict(), layers=3, today=True, pairs=False)
    counters = {f"layers.{layer}.moe.tokens_per_expert_E": torch.ones(5) for layer in range(3)}
    torch.save({**state, **counters}, tmp_path / "titan.pth")
    report = convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert {key for key, _ in report.ignored} == set(counters)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize("tied", [False, True])
def test_meta_names_and_params_make_the_same_model(tmp_path: Path, *, tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied, num_hidden_layers=11)
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "meta", form="dcp", to="meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    spec = read_spec(tmp_path / "meta")
    assert spec.origin == "meta"
    # Lingua reads the same numbers under other names, and the same tensors.
    fields = {"model": {**params, "max_seqlen": 64}}
    fields["model"] |= {"head_dim": spec.head_dim, "weight_tying": False}
    lingua = LinguaModel.from_params(fields)
    convert(tmp_path / "meta", tmp_path / "meta.pth")
    lingua.load_state_dict(torch_tensors(tmp_path / "meta.pth"))
    assert difference(lingua.eval(), model) < RIGHT

    convert(tmp_path / "meta", tmp_path / "back", form="hf", to="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_rope_frequencies_of_a_release_are_dropped(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "consolidated.00.pth", to="meta")
    state = torch_tensors(tmp_path / "consolidated.00.pth") | {"rope.freqs": torch.ones(8)}
    torch.save(state, tmp_path / "consolidated.00.pth")
    report = convert(tmp_path / "consolidated.00.pth", tmp_path / "back", form="hf", assets=source)
    assert report.source.family == "meta"
    assert report.ignored == (("rope.freqs", keymaps()["meta"].match("rope.freqs").reason),)  # type: ignore[union-attr]
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
