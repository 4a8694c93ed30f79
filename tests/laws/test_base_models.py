"""Base models: what their files call without a prefix goes where a head is not needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import CoverageError, NotExpressibleError
from lingua_model import LinguaModel
from support.checkpoints.families import (
    RIGHT,
    TOKENS,
    assert_same,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import IN_TURN, ONE_KV_HEAD, tiny
from support.models.layers import randomise
from support.models.torchtitan import Titan, TitanConfig


def based(directory: Path, model_type: str, **overrides: Any) -> nn.Module:
    """A base model alone, as its own class saves it."""
    config = tiny(model_type, **overrides).config
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    randomise(model)
    model.eval().save_pretrained(directory)
    return model  # type: ignore[no-any-return]


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(TOKENS).last_hidden_state)


TIED = {"tie_word_embeddings": True}
PAIRS = [
    pytest.param("smollm3", "llama", "LlamaModel", {"num_hidden_layers": 11}, id="smollm3-llama"),
    pytest.param("seed_oss", "llama", "LlamaModel", {"attention_bias": False}, id="seed_oss-llama"),
    pytest.param("phi3", "llama", "LlamaModel", {}, id="phi3-llama"),
    pytest.param("ernie4_5", "llama", "LlamaModel", {"use_bias": False}, id="ernie4_5-llama"),
    pytest.param("llama", "smollm3", "SmolLM3Model", TIED, id="llama-smollm3-tied"),
    pytest.param("gpt_neox", "starcoder2", "Starcoder2Model", IN_TURN, id="gpt_neox-starcoder2"),
    pytest.param("gpt_neox", "falcon", "FalconModel", IN_TURN, id="gpt_neox-falcon"),
    pytest.param("starcoder2", "falcon", "FalconModel", ONE_KV_HEAD, id="starcoder2-falcon"),
]


@pytest.mark.parametrize(("model_type", "to", "name", "overrides"), PAIRS)
def test_another_class_gives_the_hidden_states_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, to: str, name: str, overrides: dict[str, Any]
) -> None:
    model = based(tmp_path / "in", model_type, **overrides)
    assert check(tmp_path / "in", to=f"hf-{to}")
    convert(tmp_path / "in", tmp_path / "out", form="hf", to=f"hf-{to}")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == [name]
    cls = getattr(transformers, name)
    other, info = cls.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert hf_tensors(tmp_path / "out").keys() <= other.state_dict().keys()
    assert float((hidden(other.eval()) - hidden(model)).abs().max()) < RIGHT

    convert(tmp_path / "out", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "in"))


@pytest.mark.parametrize("to", ["lingua", "meta", "torchtitan-llama3"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_family_with_a_head_takes_a_tied_model_and_refuses_another(
    tmp_path: Path, to: str, head: str
) -> None:
    based(tmp_path / "in", "llama", tie_word_embeddings=head == "tied")
    if head == "untied":
        with pytest.raises(NotExpressibleError) as raised:
            convert(tmp_path / "in", tmp_path / "out", form="dcp", to=to)
        refused = [str(value) for name, value in raised.value.facts if name == "refused"]
        assert [text.split(":")[0] for text in refused] == ["no_head"]
        assert not (tmp_path / "out").exists()
        return
    assert check(tmp_path / "in", to=to)
    convert(tmp_path / "in", tmp_path / "out", form="dcp", to=to)
    convert(tmp_path / "out", tmp_path / "back", form="hf", to="hf-llama", assets=tmp_path / "in")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "in"))
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["architectures"] == ["LlamaModel"]


def of_lingua(directory: Path) -> nn.Module:
    convert(directory, directory / "lingua", to="lingua")
    model = LinguaModel.from_params(json.loads((directory / "lingua/params.json").read_text()))
    state = model.state_dict()
    load({"model": state}, checkpoint_id=directory / "lingua")
    model.load_state_dict(state)
    return model


def of_torchtitan(directory: Path) -> nn.Module:
    convert(directory, directory / "titan.pth", to="torchtitan-llama3")
    config = json.loads((directory / "config.json").read_text())
    sizes = TitanConfig(
        scaling=None,
        release="0.3",
        is_qwen=False,
        n_layers=config["num_hidden_layers"],
        n_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        enable_weight_tying=True,
    )
    model = Titan(sizes)
    model.load_state_dict(torch_tensors(directory / "titan.pth"))
    return model


def of_meta(directory: Path) -> nn.Module:
    """Meta's code needs a GPU: a Llama made of its files stands for it."""
    convert(directory, directory / "meta", form="dcp", to="meta")
    convert(directory / "meta", directory / "llama", form="hf", to="hf-llama")
    return cast("nn.Module", load_hf(directory / "llama"))


@pytest.mark.parametrize("other", [of_lingua, of_torchtitan, of_meta])
def test_the_head_that_a_tied_model_gets_is_its_embedding(
    tmp_path: Path, other: Callable[[Path], nn.Module]
) -> None:
    model: Any = based(tmp_path, "llama", num_hidden_layers=11, **TIED)
    expected = hidden(model) @ model.get_input_embeddings().weight.T
    with torch.no_grad():
        found: Any = other(tmp_path).eval()(TOKENS)
    logits = getattr(found, "logits", found)
    assert float((logits - expected).detach().abs().max()) < RIGHT


@pytest.mark.parametrize("model_type", ["gpt2", "bloom"])
def test_a_tied_model_without_its_prefix_is_a_model_with_a_head(
    tmp_path: Path, model_type: str
) -> None:
    """As the Hub has ``gpt2`` and ``bigscience/bloom``."""
    case = tiny(model_type, tie_word_embeddings=True)
    model: Any = case
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "in")
    bare = {
        key.removeprefix("transformer."): tensor
        for key, tensor in hf_tensors(tmp_path / "whole").items()
    }
    save_file(bare, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    assert check(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "same", form="hf")
    assert_same(hf_tensors(tmp_path / "same"), bare)
    convert(tmp_path / "in", tmp_path / "out", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "whole"))


def test_without_a_config_the_keys_alone_are_a_base_model(tmp_path: Path) -> None:
    based(tmp_path / "in", "llama")
    (tmp_path / "in/config.json").unlink()
    assert check(tmp_path / "in", to="hf-llama", spec="heads=6,kv_heads=2")
    with pytest.raises((CoverageError, NotExpressibleError)) as raised:
        convert(
            tmp_path / "in",
            tmp_path / "out",
            form="dcp",
            from_="hf-llama",
            to="lingua",
            spec="heads=6,kv_heads=2,theta=1e4,eps=1e-6",
        )
    assert any("no_head" in str(value) for _, value in raised.value.facts)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "falcon", "bloom"])
def test_a_live_base_model_is_filled_from_itself_and_from_a_model_with_a_head(
    tmp_path: Path, model_type: str
) -> None:
    model: Any = based(tmp_path / "base", model_type)
    whole: Any = tiny(model_type)
    whole.save_pretrained(tmp_path / "whole")
    wanted = {"base": model, "whole": getattr(whole, whole.base_model_prefix)}
    for name, expected in wanted.items():
        with torch.device("meta"):
            fresh = type(model)(model.config)
        load_init_weights(fresh, tmp_path / name, strict=name == "base")
        assert_same(dict(fresh.state_dict()), dict(expected.state_dict()))
    assert check(tmp_path / "base", against=model)


def test_what_stands_beside_an_embedding_model_goes_along(tmp_path: Path) -> None:
    """``modules.json`` and ``1_Pooling/config.json``, as sentence-transformers saves them."""
    based(tmp_path / "in", "llama")
    beside = {
        "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
        "config_sentence_transformers.json": "{}",
        "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
        "2_Dense/config.json": '{"in_features": 96}',
    }
    for name, text in beside.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    save_file({"linear.weight": torch.rand(3, 96)}, tmp_path / "in/2_Dense/model.safetensors")
    convert(tmp_path / "in", tmp_path / "other", form="hf", to="hf-smollm3")
    convert(tmp_path / "other", tmp_path / "dcp", form="dcp")
    convert(tmp_path / "dcp", tmp_path / "out", form="hf", to="hf-llama")
    for place in ("other", "dcp", "out"):
        for name, text in beside.items():
            assert (tmp_path / place / name).read_text() == text
        dense = load_file(tmp_path / place / "2_Dense/model.safetensors")
        assert_same(dense, load_file(tmp_path / "in/2_Dense/model.safetensors"))
    assert_same(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "in"))
