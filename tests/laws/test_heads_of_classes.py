"""Heads for texts, tokens and answers of every class that has them, through both namings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import NotExpressibleError
from dcpconv.families.configs.model_type import class_name, heads_of
from dcpconv.families.configs.model_types import MODEL_TYPES
from support.checkpoints.families import RIGHT, TOKENS, assert_same, hf_tensors
from support.models.hf_models import IN_TURN, ONE_KV_HEAD, tiny
from support.models.hf_models import MODEL_TYPES as TINY
from support.models.layers import randomise

HEADS = ("score", "score_bias", "spans", "no_head")
_SPECIAL = {"no_head": "none"}


def relative(model_type: str, head: str) -> type[Any] | None:
    name = class_name(MODEL_TYPES[model_type], _SPECIAL.get(head, head))
    found: type[Any] | None = getattr(transformers, name, None)
    return found


def headed(directory: Path, model_type: str, head: str, **overrides: Any) -> Any:
    config = tiny(model_type, **overrides).config
    config.num_labels, config.pad_token_id = 3, 0
    if head == "spans":
        config.num_labels = 2
    cls = relative(model_type, head)
    assert cls is not None
    model = cls(config)
    randomise(model)
    model.eval().save_pretrained(directory)
    return model


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS[:1])
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return torch.cat([out[name].flatten() for name in names if name in out])


CASES = [
    pytest.param(model_type, head, id=f"{model_type}-{head}")
    for model_type in TINY
    if model_type in MODEL_TYPES and MODEL_TYPES[model_type].language is None
    for head in HEADS
    if head in heads_of(model_type)
]


def test_classes_have_the_relatives_that_transformers_has() -> None:
    for model_type in MODEL_TYPES:
        has = {head for head in HEADS if relative(model_type, head) is not None}
        assert heads_of(model_type) <= has, model_type
        if not MODEL_TYPES[model_type].is_copied:
            assert has - heads_of(model_type) == set(), model_type


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_its_keys_are_all_known_and_go_there_and_back(
    tmp_path: Path, model_type: str, head: str
) -> None:
    model = headed(tmp_path / "in", model_type, head)
    assert check(tmp_path / "in")
    assert check(tmp_path / "in", against=model)
    convert(tmp_path / "in", tmp_path / "dcp", form="dcp", to="hf-memory")
    convert(tmp_path / "dcp", tmp_path / "out", form="hf", to="hf", assets=tmp_path / "in")
    assert_same(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "in"))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == [type(model).__name__]
    with torch.device("meta"):
        fresh = type(model)(model.config)
    load_init_weights(fresh, tmp_path / "dcp", assets=tmp_path / "in")
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


PAIRS = [
    pytest.param("smollm3", "llama", "spans", {"num_hidden_layers": 11}, id="smollm3-llama"),
    pytest.param("llama", "smollm3", "spans", {"tie_word_embeddings": True}, id="llama-smollm3"),
    pytest.param("llama", "seed_oss", "spans", {}, id="llama-seed_oss"),
    pytest.param("ministral3", "llama", "spans", {}, id="ministral3-llama"),
    pytest.param("gpt_neox", "falcon", "spans", IN_TURN, id="gpt_neox-falcon"),
    pytest.param("gpt_neox", "falcon", "score", IN_TURN, id="gpt_neox-falcon-texts"),
    pytest.param("gpt_neox", "starcoder2", "score", IN_TURN, id="gpt_neox-starcoder2-texts"),
    pytest.param("gpt_neox", "starcoder2", "score_bias", IN_TURN, id="gpt_neox-starcoder2-tokens"),
    pytest.param("starcoder2", "falcon", "score_bias", ONE_KV_HEAD, id="starcoder2-falcon-tokens"),
]


@pytest.mark.parametrize(("model_type", "to", "head", "overrides"), PAIRS)
def test_another_class_answers_alike_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, to: str, head: str, overrides: dict[str, Any]
) -> None:
    model = headed(tmp_path / "in", model_type, head, **overrides)
    assert check(tmp_path / "in", to=f"hf-{to}")
    convert(tmp_path / "in", tmp_path / "out", form="hf", to=f"hf-{to}")
    cls = relative(to, head)
    assert cls is not None
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == [cls.__name__]
    other, info = cls.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert float((answers(other.eval()) - answers(model)).abs().max()) < RIGHT

    convert(tmp_path / "out", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "in"))


def test_biases_of_a_class_stay_where_the_head_goes(tmp_path: Path) -> None:
    """``use_bias`` of ERNIE 4.5 MoE adds one to the head, too, not to its base model."""
    model = headed(tmp_path / "in", "ernie4_5_moe", "no_head", use_bias=True)
    assert any(key.endswith("q_proj.bias") for key in model.state_dict())
    convert(tmp_path / "in", tmp_path / "dcp", form="dcp", to="hf-memory")
    convert(tmp_path / "dcp", tmp_path / "out", form="hf", to="hf", assets=tmp_path / "in")
    assert_same(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "in"))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["use_bias"] is True


@pytest.mark.parametrize("to", ["lingua", "meta", "torchtitan-llama3", "hf-cwm"])
def test_a_family_without_answers_refuses_them_by_name(tmp_path: Path, to: str) -> None:
    headed(tmp_path / "in", "llama", "spans")
    with pytest.raises(NotExpressibleError) as raised:
        convert(tmp_path / "in", tmp_path / "out", form="dcp", to=to)
    refused = [str(value).split(":")[0] for name, value in raised.value.facts if name == "refused"]
    assert refused == ["spans"]
    assert not (tmp_path / "out").exists()
