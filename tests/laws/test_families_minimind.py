"""MiniMind's four generations, dense and with experts, against the models they should become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

from dcpconv import check, convert
from dcpconv.core.errors import CoverageError, LayoutError, NotExpressibleError
from dcpconv.families.configs import read_spec, to_text, write_config
from lingua_model import LinguaModel
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.layers import randomise
from support.models.minimind import MiniMind, MiniMindConfig, save_pth

META_STYLE = {"gen1", "gen2"}


def minimind(**sizes: Any) -> MiniMind:
    return randomise(MiniMind(MiniMindConfig(**sizes)))


def config_json(config: MiniMindConfig) -> dict[str, object]:
    """config.json as the classes of each generation save it, with these sizes."""
    fields: dict[str, object] = {"model_type": "minimind", "vocab_size": config.vocab_size}
    is_old = config.generation in META_STYLE
    if is_old:
        fields |= {
            "dim": config.dim,
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "n_kv_heads": config.n_kv_heads,
            "hidden_dim": config.ffn_dim,
            "norm_eps": config.facts.eps,
            "max_seq_len": config.max_seqlen,
        }
        if config.generation == "gen2":
            fields["rope_theta"] = config.facts.theta
    else:
        fields |= {
            "hidden_size": config.dim,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "intermediate_size": config.ffn_dim,
            "rms_norm_eps": config.facts.eps,
            "max_position_embeddings": config.max_seqlen,
            "rope_theta": config.facts.theta,
        }
    fields |= {"use_moe": config.experts > 0, "num_experts_per_tok": config.top_k}
    if config.generation == "gen4":
        fields |= {
            "head_dim": config.head_dim,
            "num_experts": config.experts or 4,
            "moe_intermediate_size": config.ffn_dim,
            "tie_word_embeddings": config.tied,
        }
    else:
        shared: object = (bool(config.shared_experts) or None) if is_old else config.shared_experts
        fields |= {"n_routed_experts": config.experts or 4, "n_shared_experts": shared}
    return fields


def save(model: MiniMind, directory: Path) -> Path:
    """A ``.pth`` with a config.json beside it."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(model.config)))
    torch.save(model.state_dict(), directory / "model.pth")
    return directory / "model.pth"


def learned(model: MiniMind) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if "mask" not in key}


EXPERTS = {"experts": 5, "ffn_dim": 52}
CASES = [
    pytest.param({"generation": "gen1"}, "hf-llama", id="gen1"),
    pytest.param({"generation": "gen1", "mask": True}, "hf-llama", id="gen1-with-masks"),
    pytest.param({"generation": "gen2", "n_layers": 11}, "hf-llama", id="gen2-eleven-layers"),
    pytest.param({"generation": "gen3"}, "hf-llama", id="gen3"),
    pytest.param({"generation": "gen4", "head_dim": 24}, "hf-qwen3", id="gen4"),
    pytest.param({"generation": "gen4", "tied": False}, "hf-qwen3", id="gen4-untied"),
    pytest.param({"generation": "gen1", **EXPERTS}, "hf-ernie4_5_moe", id="gen1-ernie"),
    pytest.param({"generation": "gen1", **EXPERTS}, "hf-granitemoeshared", id="gen1-granite"),
    pytest.param({"generation": "gen2", **EXPERTS}, "hf-ernie4_5_moe", id="gen2-ernie"),
    pytest.param(
        {"generation": "gen2", **EXPERTS, "shared_experts": 0}, "hf-mixtral", id="gen2-none-shared"
    ),
    pytest.param(
        {"generation": "gen3", **EXPERTS, "shared_experts": 2}, "hf-ernie4_5_moe", id="gen3-ernie"
    ),
    pytest.param(
        {"generation": "gen3", **EXPERTS, "experts": 11, "shared_experts": 2},
        "hf-granitemoeshared",
        id="gen3-granite-eleven-experts",
    ),
    pytest.param({"generation": "gen4", **EXPERTS, "top_k": 1}, "hf-qwen3_moe", id="gen4-experts"),
]


@pytest.mark.parametrize(("sizes", "to"), CASES)
def test_the_converted_model_gives_the_same_logits_and_comes_back(
    tmp_path: Path, sizes: dict[str, Any], to: str
) -> None:
    model = minimind(**sizes)
    source = save(model, tmp_path / "minimind")
    family = f"minimind{model.config.generation[-1]}"
    report = convert(source, tmp_path / "hf", form="hf", to=to)
    assert (report.source.family, report.target.family) == (family, to)
    assert difference(load_hf(tmp_path / "hf"), model) < RIGHT

    convert(tmp_path / "hf", tmp_path / "back.pth", to=family)
    assert_same(torch_tensors(tmp_path / "back.pth"), learned(model))


@pytest.mark.parametrize("generation", ["gen1", "gen2", "gen3"])
def test_a_dense_model_of_the_first_three_generations_is_a_lingua_model(
    tmp_path: Path, generation: Any
) -> None:
    model = minimind(generation=generation)
    source = save(model, tmp_path / "minimind")
    convert(source, tmp_path / "lingua", to="lingua")
    lingua = LinguaModel.from_params(json.loads((tmp_path / "lingua" / "params.json").read_text()))
    state = lingua.state_dict()
    load({"model": state}, checkpoint_id=tmp_path / "lingua")
    lingua.load_state_dict(state)
    assert difference(lingua.eval(), model) < RIGHT

    convert(tmp_path / "lingua", tmp_path / "back.pth", to=f"minimind{generation[-1]}", root="")
    assert_same(torch_tensors(tmp_path / "back.pth"), learned(model))


@pytest.mark.parametrize("generation", ["gen1", "gen2", "gen3", "gen4"])
@pytest.mark.parametrize("experts", [0, 5])
def test_our_config_reads_back_to_the_same_spec(
    tmp_path: Path, generation: Any, experts: int
) -> None:
    config = MiniMindConfig(generation=generation, experts=experts, ffn_dim=152)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    spec = read_spec(tmp_path)
    assert spec.origin == f"minimind{generation[-1]}"
    (tmp_path / "config.json").write_text(to_text(write_config(spec.origin, spec)))
    assert read_spec(tmp_path) == spec


def test_a_plain_file_needs_only_its_head_counts(tmp_path: Path) -> None:
    model = minimind(generation="gen2")
    save_pth(model, tmp_path / "full_sft_96.pth")
    report = convert(
        tmp_path / "full_sft_96.pth",
        tmp_path / "hf",
        form="hf",
        from_="minimind2",
        spec="heads=6,kv_heads=2",
    )
    assert any("rope_theta 1e+06" in note for note in report.notes)
    assert difference(load_hf(tmp_path / "hf"), model) < RIGHT


def test_without_head_counts_nothing_is_guessed(tmp_path: Path) -> None:
    save_pth(minimind(generation="gen2"), tmp_path / "full_sft_96.pth")
    with pytest.raises(LayoutError, match="size of axis"):
        convert(tmp_path / "full_sft_96.pth", tmp_path / "hf", form="hf", from_="minimind2")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("generation", "sizes"),
    [
        pytest.param("gen1", {"n_heads": 16, "n_kv_heads": 8, "head_dim": 32}, id="gen1"),
        pytest.param("gen2", {"n_heads": 8, "n_kv_heads": 2, "head_dim": 64}, id="gen2"),
    ],
)
def test_a_published_size_brings_its_head_counts_with_a_notice(
    tmp_path: Path, generation: Any, sizes: dict[str, int]
) -> None:
    model = minimind(
        generation=generation, dim=512, n_layers=8, ffn_dim=24, vocab_size=6400, **sizes
    )
    save_pth(model, tmp_path / "pretrain_512.pth")
    report = convert(tmp_path / "pretrain_512.pth", tmp_path / "hf", form="hf")
    assert report.source.family == f"minimind{generation[-1]}"
    heads = f"{sizes['n_heads']} heads and {sizes['n_kv_heads']} kv heads"
    assert any(heads in note for note in report.notes)
    assert difference_small(load_hf(tmp_path / "hf"), model) < RIGHT


def difference_small(left: Any, right: Any) -> float:
    tokens = torch.arange(12)[None] * 501
    with torch.no_grad():
        return float((left(tokens).logits - right(tokens)).abs().max())


def test_half_precision_files_of_ddp_and_compile_are_read(tmp_path: Path) -> None:
    model = minimind(generation="gen3")
    state = {f"module._orig_mod.{k}": v.half() for k, v in model.state_dict().items()}
    (tmp_path / "a").mkdir()
    torch.save(state, tmp_path / "a" / "full_sft_96.pth")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config_json(model.config)))
    convert(tmp_path / "a" / "full_sft_96.pth", tmp_path / "hf", form="hf")
    found = hf_tensors(tmp_path / "hf")
    assert "lm_head.weight" not in found
    assert all(torch.equal(found[key], model.state_dict()[key].half()) for key in found)


REFUSED = [
    pytest.param({"generation": "gen4"}, "lingua", {"qk_norm"}, id="gen4-lingua"),
    pytest.param({"generation": "gen4"}, "hf-llama", {"qk_norm"}, id="gen4-llama"),
    pytest.param({"generation": "gen3"}, "minimind4", {"qk_norm"}, id="gen3-gen4"),
    pytest.param({"generation": "gen2"}, "minimind1", {"rope_theta"}, id="gen2-gen1"),
    pytest.param({"generation": "gen2", **EXPERTS}, "lingua", {"experts"}, id="experts-lingua"),
    pytest.param(
        {"generation": "gen3", **EXPERTS, "top_k": 1},
        "hf-ernie4_5_moe",
        {"experts"},
        id="one-expert-not-renormalised",
    ),
    pytest.param(
        {"generation": "gen3", **EXPERTS, "shared_experts": 2},
        "minimind2",
        {"experts"},
        id="two-shared-in-one-place",
    ),
]


@pytest.mark.parametrize(("sizes", "to", "names"), REFUSED)
def test_what_a_family_cannot_hold_is_refused(
    tmp_path: Path, sizes: dict[str, Any], to: str, names: set[str]
) -> None:
    source = save(minimind(**sizes), tmp_path / "minimind")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused == names


def test_a_selection_bias_that_does_something_does_not_get_lost(tmp_path: Path) -> None:
    model = minimind(generation="gen1", **EXPERTS)
    source = save(model, tmp_path / "minimind")
    convert(source, tmp_path / "hf", form="hf")
    ernie = load_hf(tmp_path / "hf")
    key = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"
    ernie.state_dict()[key][0, 2] = 0.25
    ernie.save_pretrained(tmp_path / "biased")
    with pytest.raises(NotExpressibleError, match="minimind1 cannot express"):
        convert(tmp_path / "biased", tmp_path / "back.pth", to="minimind1")
    with pytest.raises(CoverageError, match="3 unknown"):
        convert(tmp_path / "biased", tmp_path / "back.pth", to="minimind1", allow=["experts"])


def test_generations_that_agree_in_all_but_names_convert_into_each_other(tmp_path: Path) -> None:
    model = minimind(generation="gen2")
    source = save(model, tmp_path / "two")
    convert(source, tmp_path / "three.pth", to="minimind3")
    third = MiniMind(replace(model.config, generation="gen3"))
    third.load_state_dict(torch_tensors(tmp_path / "three.pth"))
    assert difference(third.eval(), model) < RIGHT


@pytest.mark.parametrize("generation", ["gen1", "gen2", "gen3", "gen4"])
def test_a_check_against_the_config_names_minimind(generation: str, tmp_path: Path) -> None:
    source = save(minimind(generation=generation), tmp_path / "mm")

    coverage = check(source.parent, against=source.parent / "config.json")

    assert coverage
    assert coverage.target == coverage.source
    assert coverage.target.startswith("minimind")
