"""Stretched RoPE: another class turns by the same angles, or the stretch is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from dcpconv.families.configs import read_spec
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import save_hf, tiny
from support.models.layers import random_tokens
from support.models.meta_package import MetaLlama3, one_rank

THETA = {"rope_theta": 1e4}
KINDS: Mapping[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0 + channel / 8 for channel in range(8)],
        "long_factor": [2.0 + channel / 4 for channel in range(8)],
        "original_max_position_embeddings": 16,
    },
}
"""What each kind states, in tiny numbers: all of them change 23 tokens."""

IN_TURN = {"use_parallel_residual": False, "num_key_value_heads": 6}
ALL_HEADS = {"multi_query": False, "bias": True, "parallel_attn": False}
PAIRS = [
    pytest.param("llama", {}, "ernie4_5", id="llama-ernie4_5"),
    pytest.param("ernie4_5", {}, "llama", id="ernie4_5-llama"),
    pytest.param("smollm3", {}, "llama", id="smollm3-llama"),
    pytest.param("helium", {}, "llama", id="helium-llama"),
    pytest.param("seed_oss", {"attention_bias": False}, "llama", id="seed_oss-llama"),
    pytest.param("granite", {"attention_multiplier": 0.25}, "llama", id="granite-llama"),
    pytest.param("gpt_neox", IN_TURN, "starcoder2", id="gpt_neox-starcoder2"),
    pytest.param("starcoder2", {"num_key_value_heads": 6}, "gpt_neox", id="starcoder2-gpt_neox"),
    pytest.param("falcon", ALL_HEADS, "gpt_neox", id="falcon-gpt_neox"),
    pytest.param("gpt_neox", IN_TURN, "falcon", id="gpt_neox-falcon"),
    pytest.param("qwen3_moe", {}, "mellum", id="qwen3_moe-mellum"),
    pytest.param("granitemoe", {"attention_multiplier": 0.25}, "mixtral", id="granitemoe-mixtral"),
]


PARTLY = {"phi": 0.5, "stablelm": 0.25}
"""Share of each head that turns."""


def stretched(model_type: str, kind: str, **overrides: Any) -> Any:
    """A tiny model whose RoPE is stretched, and whose whole heads turn where a class says so."""
    rope = {**THETA, "rope_type": kind, **KINDS[kind]}
    if model_type == "gpt_neox":
        rope["partial_rotary_factor"] = 1.0
    if model_type in PARTLY and kind == "longrope":  # a factor for each pair that turns
        rope["partial_rotary_factor"] = PARTLY[model_type]
        pairs = int(8 * PARTLY[model_type])
        rope |= {name: rope[name][:pairs] for name in ("short_factor", "long_factor")}
    if kind == "dynamic":  # what is longer than this is stretched
        overrides = {**overrides, "max_position_embeddings": 16}
    return tiny(model_type, rope_parameters=rope, **overrides)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model_type", "overrides", "to"), PAIRS)
def test_another_class_stretches_alike_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], to: str, kind: str
) -> None:
    model = stretched(model_type, kind, **overrides)
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to=f"hf-{to}")
    convert(source, tmp_path / "other", form="hf", to=f"hf-{to}")
    other = load_hf(tmp_path / "other")
    assert other.config.model_type == to
    assert difference(other, model) < RIGHT

    plain = {**THETA, "rope_type": "default"}
    if model_type == "gpt_neox":
        plain["partial_rotary_factor"] = 1.0
    unstretched = tiny(model_type, rope_parameters=plain, **overrides)
    assert difference(unstretched, model) > 100 * RIGHT

    convert(tmp_path / "other", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), model) < RIGHT


OLDER = ["phi", "starcoder2", "stablelm", "gpt_neox", "falcon"]
PLAIN = ["llama", "mistral", "smollm3", "ernie4_5", "helium", "internlm3"]
OTHERS = ["qwen2", "qwen3", "olmo2", "gemma2", "cohere", "arcee", "exaone4", "mixtral"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [*OLDER, *PLAIN, *OTHERS])
def test_what_a_trainer_does_not_stretch_is_refused_by_name(
    tmp_path: Path, model_type: str, kind: str
) -> None:
    source = save_hf(stretched(model_type, kind), tmp_path / "hf")
    spec = read_spec(source)
    assert spec.rope_scaling is not None
    assert spec.rope_scaling.kind == kind
    for to in ("lingua", "meta", "torchtitan-llama3"):
        is_known = to == "torchtitan-llama3" and kind == "llama3"
        if is_known and model_type in PLAIN:
            assert check(source, to=to)  # another test compares its logits
            continue
        with pytest.raises(NotExpressibleError) as raised:
            convert(source, tmp_path / "out", to=to)
        told = [str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"]
        assert ("rope_scaling" in told) != is_known
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", OLDER)
def test_an_older_class_keeps_its_stretch_on_the_way_through_memory(
    tmp_path: Path, model_type: str, kind: str
) -> None:
    model = stretched(model_type, kind)
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="hf-memory")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf")
    assert difference(load_hf(tmp_path / "back"), model) == 0.0


LONG = random_tokens(131, seq=600, seed=3)
META: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "ernie4_5", "cwm"])
def test_metas_own_code_stretches_as_llama_3_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    pytest.importorskip("fairscale", reason="needs .[interop]")
    pytest.importorskip("llama_models", reason="needs .[interop]")
    hf = tiny(model_type, **META)
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "meta", form="dcp", to="meta")
    convert(tmp_path / "meta", tmp_path / "consolidated.00.pth")
    params = json.loads((tmp_path / "meta/params.json").read_text())
    with one_rank(tmp_path, monkeypatch), torch.no_grad():
        model = MetaLlama3(params)
        model.model.load_state_dict(torch_tensors(tmp_path / "consolidated.00.pth"))
        found = model.eval()(LONG)
        expected = hf(LONG).logits
        assert float((found - expected).abs().max()) < RIGHT
        plain = {"rope_type": "default", "rope_theta": 1e5}
        other = tiny(model_type, **{**META, "rope_parameters": plain})(LONG).logits
        assert float((other - expected).abs().max()) > 100 * RIGHT
