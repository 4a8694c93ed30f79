"""Meta's own Llama 4: the logits of the Hugging Face model, under the names of two sides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpconv import check, convert, load_init_weights
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
from support.models.meta_package import MetaLlama4, loaded, one_rank

pytest.importorskip("fairscale", reason="needs .[interop]")
pytest.importorskip("llama_models", reason="needs .[interop]")

NAMINGS = ["meta-llama4", "meta-memory-llama4"]
SCALED = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
DENSE: dict[str, Any] = {
    "num_local_experts": 0,
    "moe_layers": [],
    "interleave_moe_layer_step": 0,
}
"""As Llama Guard 4 says that it has no experts."""
CASES = [
    pytest.param({}, id="usual"),
    pytest.param({"num_hidden_layers": 12, "no_rope_layer_interval": 4}, id="twelve-layers"),
    pytest.param({"num_local_experts": 11, "num_experts_per_tok": 3}, id="eleven-experts"),
    pytest.param({"interleave_moe_layer_step": 1}, id="experts-everywhere"),
    pytest.param({"no_rope_layers": [1, 1, 1]}, id="all-turned"),
    pytest.param({"use_qk_norm": False, "attn_temperature_tuning": False}, id="no-norms"),
    pytest.param({"layer_types": ["full_attention"] * 3}, id="no-chunks"),
    pytest.param({"intermediate_size": 211, "intermediate_size_mlp": 83}, id="odd-widths"),
    pytest.param(SCALED, id="scaled-rope"),
    pytest.param(DENSE, id="dense"),
    pytest.param({**DENSE, "num_local_experts": 5, "num_hidden_layers": 11}, id="dense-by-layers"),
]


@pytest.fixture(autouse=True)
def _on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with one_rank(tmp_path, monkeypatch):
        yield


def written(source: Path, directory: Path, to: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A conversion into one file: the params.json beside its DCP twin, and the file's tensors."""
    convert(source, directory / "dcp", form="dcp", to=to)
    convert(directory / "dcp", directory / "consolidated.00.pth")
    params = json.loads((directory / "dcp/params.json").read_text())
    return params, torch_tensors(directory / "consolidated.00.pth")


@pytest.mark.parametrize("to", NAMINGS)
@pytest.mark.parametrize("overrides", CASES)
def test_both_compute_the_same_and_the_way_back_is_exact(
    tmp_path: Path, overrides: dict[str, Any], to: str
) -> None:
    hf = tiny("llama4_text", **overrides)
    source = save_hf(hf, tmp_path / "hf")
    assert check(source, to=to)
    params, tensors = written(source, tmp_path, to)
    assert difference(loaded(params, tensors), hf) < RIGHT

    convert(tmp_path / "dcp", tmp_path / "back", form="hf", to="hf-llama4_text")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), hf) < RIGHT


def test_a_live_model_takes_files_of_either_side(tmp_path: Path) -> None:
    hf = tiny("llama4_text", num_hidden_layers=11)
    source = save_hf(hf, tmp_path / "hf")
    params, _ = written(source, tmp_path, "meta-llama4")
    live = MetaLlama4(params)
    load_init_weights(live.model, source, to="meta-memory-llama4")
    assert difference(live.eval(), hf) < RIGHT

    with torch.device("meta"):
        fresh = type(hf)(hf.config)
    load_init_weights(fresh, tmp_path / "dcp", to="hf-memory")
    assert_same(dict(fresh.state_dict()), dict(hf.state_dict()))


@pytest.mark.parametrize("to", NAMINGS)
@pytest.mark.parametrize("rope", [{"rope_theta": 1e4, "rope_type": "default"}, SCALED])
def test_a_plain_llama_is_one_without_experts(
    tmp_path: Path, rope: dict[str, Any], to: str
) -> None:
    hf = tiny("llama", rope_parameters=rope.get("rope_parameters", rope))
    source = save_hf(hf, tmp_path / "hf")
    params, tensors = written(source, tmp_path, to)
    assert difference(loaded(params, tensors), hf) < RIGHT
    convert(tmp_path / "dcp", tmp_path / "back", form="hf", to="hf-llama")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_a_file_without_its_parameters_is_known_by_its_names(tmp_path: Path) -> None:
    source = save_hf(tiny("llama4_text", **DENSE), tmp_path / "hf")
    convert(source, tmp_path / "dense.pth", form="torch", to="meta-llama4")
    report = convert(tmp_path / "dense.pth", tmp_path / "back", form="hf", to="hf", assets=source)
    assert report.source.family == "meta-llama4"
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize("nested", [False, True])
def test_widths_follow_from_the_file_of_a_release(tmp_path: Path, *, nested: bool) -> None:
    """The parameters of Llama 4 Scout, and what its config.json on the Hub says."""
    params = {
        "dim": 5120,
        "ffn_dim_multiplier": 1.2,
        "ffn_exp": 4,
        "moe_args": {
            "auto_scale_F": True,
            "capacity_factor": 1.0,
            "interleave_moe_layer_step": 1,
            "num_experts": 16,
        },
        "multiple_of": 2048,
        "n_heads": 40,
        "n_kv_heads": 8,
        "n_layers": 48,
        "nope_layer_interval": 4,
        "norm_eps": 1e-05,
        "attention_chunk_size": 8192,
        "rope_theta": 500_000.0,
        "use_qk_norm": True,
        "use_scaled_rope": True,
        "vocab_size": 202_048,
    }
    (tmp_path / "params.json").write_text(json.dumps({"model": params} if nested else params))
    spec = read_spec(tmp_path)
    assert spec.origin == "meta-llama4"
    assert spec.experts is not None
    assert (spec.ffn_size, spec.experts.ffn_size) == (16_384, 8192)
    assert spec.unaccounted == ()
    assert spec.no_rope_layers == tuple(range(3, 48, 4))


REFUSED = [
    pytest.param({"attention_bias": True}, {"qkv_bias", "o_bias"}, id="biases"),
    pytest.param({"tie_word_embeddings": True}, {"tied"}, id="tied"),
    pytest.param({"head_dim": 24}, {"head_dim"}, id="wide-heads"),
    pytest.param({"moe_layers": [0, 2]}, {"experts"}, id="no-stride-of-experts"),
    pytest.param({"no_rope_layers": [0, 1, 1]}, {"no_rope_layers"}, id="no-stride-of-still-layers"),
    pytest.param(
        {"layer_types": ["full_attention", "chunked_attention", "chunked_attention"]},
        {"chunked_attention"},
        id="chunks-elsewhere",
    ),
    pytest.param(
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_scaling"},
        id="linear-rope",
    ),
]


@pytest.mark.parametrize(("overrides", "names"), REFUSED)
def test_what_metas_code_cannot_compute_is_refused_by_name(
    tmp_path: Path, overrides: dict[str, Any], names: set[str]
) -> None:
    source = save_hf(tiny("llama4_text", **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to="meta-llama4")
    refused = {str(v).split(":")[0] for label, v in raised.value.facts if label == "refused"}
    assert refused == names


def test_statistics_of_training_are_dropped_with_a_reason(tmp_path: Path) -> None:
    source = save_hf(tiny("llama4_text"), tmp_path / "hf")
    params, tensors = written(source, tmp_path, "meta-llama4")
    more = {"layers.1.feed_forward.global_gate_stats_3E": torch.zeros(3, 5)}
    (tmp_path / "release").mkdir()
    torch.save({**tensors, **more}, tmp_path / "release/consolidated.00.pth")
    (tmp_path / "release/params.json").write_text(json.dumps(params))
    report = convert(tmp_path / "release", tmp_path / "back", form="hf", to="hf-llama4_text")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert report.ignored == tuple((key, "statistics of training") for key in more)
