"""Kimi K2.5 under the names of its files and of a live model, tower included, and Kimi K2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dcpconv import check, convert, load_init_weights
from dcpconv.families.configs import read_spec
from support.checkpoints.families import (
    assert_same,
    hf_tensors,
    load_hf,
    logits,
    torch_tensors,
)
from support.models.hf_models import save_hf, tiny
from support.models.nested_models import small

MEMORY = "hf-memory-kimi_k25"
CASES = [
    pytest.param({}, id="usual"),
    pytest.param({"num_hidden_layers": 11, "n_routed_experts": 12}, id="eleven-layers"),
    pytest.param({"q_lora_rank": None, "attention_bias": True}, id="direct-queries-biased"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"first_k_dense_replace": 0, "n_shared_experts": 2}, id="two-shared"),
]


def published(model: Any, directory: Path) -> Path:
    """The model in a directory as the Hub spells it, from the tensors of the live model."""
    live = directory / "live"
    model.config.save_pretrained(live)
    torch.save(dict(model.state_dict()), live / "live.pth")
    convert(live / "live.pth", directory / "hf", form="hf", to="hf-kimi_k25", from_=MEMORY)
    return directory / "hf"


@pytest.mark.parametrize("overrides", CASES)
def test_transformers_makes_the_same_live_model_of_the_published_names(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    model = small("kimi_k25", **overrides)
    source = published(model, tmp_path)
    assert all(
        key.startswith(("language_model.", "vision_tower.", "mm_projector."))
        for key in hf_tensors(source)
    )
    loaded = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(
        source, attn_implementation="eager"
    ).eval()
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(logits(loaded), logits(model))

    assert check(source, to=MEMORY)
    convert(source, tmp_path / "again.pth", to="hf-memory")
    assert_same(torch_tensors(tmp_path / "again.pth"), dict(model.state_dict()))
    with torch.device("meta"):
        fresh = type(model)(model.config)
    load_init_weights(fresh, source, to=MEMORY)
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


def test_queries_and_keys_of_the_tower_change_places(tmp_path: Path) -> None:
    """Channel 1 of a head, which turns with channel 0 in a file, is channel 8 in memory."""
    model = small("kimi_k25")
    tensors = hf_tensors(published(model, tmp_path))
    state = model.state_dict()
    stored = tensors["vision_tower.encoder.blocks.1.wqkv.weight"].reshape(3, 48, 48)
    for number, name in enumerate("qkv"):
        held = state[f"model.vision_tower.layers.1.attn.{name}_proj.weight"]
        assert torch.equal(stored[number, 17], held[17 if name == "v" else 24])


def test_kimi_k2_is_a_deepseek_v3_in_memory_too(tmp_path: Path) -> None:
    """Its file calls its class otherwise, and comes with code that transformers does without."""
    model = tiny("deepseek_v3", num_hidden_layers=11)
    source = save_hf(model, tmp_path / "hf")
    file = source / "config.json"
    fields = json.loads(file.read_text())
    code = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    file.write_text(json.dumps({**fields, "model_type": "kimi_k2", "auto_map": code}))
    assert read_spec(source).unaccounted == ()
    assert check(source, to="hf-memory")
    convert(source, tmp_path / "dcp", form="dcp", to="hf-memory")
    convert(tmp_path / "dcp", tmp_path / "live.pth")
    assert_same(torch_tensors(tmp_path / "live.pth"), dict(model.state_dict()))

    convert(tmp_path / "dcp", tmp_path / "back", form="hf", to="hf")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert torch.equal(logits(load_hf(tmp_path / "back")), logits(model))
