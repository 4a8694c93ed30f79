"""Classes whose layers of two kinds have sizes of their own: every form, naming and switch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import NotExpressibleError
from dcpconv.families.configs import read_spec
from dcpconv.families.configs.by_kind import BY_KIND
from support.checkpoints.families import (
    RIGHT,
    assert_config_says_every_key,
    assert_every_form_holds,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    logits,
)
from support.models.by_kind_cases import BY_KIND_CASES, MANY
from support.models.hf_models import save_hf, tiny

CASES = [*(pytest.param(name, {}, id=name) for name in BY_KIND), *BY_KIND_CASES]


@pytest.mark.parametrize("model_type", BY_KIND)
def test_every_form_and_both_namings_hold_the_same_bits(tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type, dtype=torch.bfloat16, **MANY[model_type])
    assert_every_form_holds(model, tmp_path)


@pytest.mark.parametrize(("model_type", "overrides"), CASES)
def test_the_config_alone_says_every_key_and_shape(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model = tiny(model_type, **overrides)
    assert_config_says_every_key(model, model_type, tmp_path)
    assert read_spec(tmp_path).unaccounted == ()


@pytest.mark.parametrize(("model_type", "overrides"), CASES)
def test_logits_survive_a_trip_through_memory(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model = tiny(model_type, **overrides)
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="hf-memory")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf")
    assert torch.equal(logits(load_hf(tmp_path / "back")), logits(model))

    with torch.device("meta"):
        fresh = type(model)(model.config)
    load_init_weights(fresh, tmp_path / "dcp")
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("model_type", BY_KIND)
def test_check_accounts_for_every_key_and_size(tmp_path: Path, model_type: str) -> None:
    source = save_hf(tiny(model_type, **MANY[model_type]), tmp_path / "hf")
    assert check(source, to="hf-memory")
    assert check(source)

    tensors = hf_tensors(source)
    gone = next(key for key in tensors if "experts" in key)
    other = next(key for key in tensors if key.endswith(("q_proj.weight", "q_b_proj.weight")))
    damaged = {name: tensor for name, tensor in tensors.items() if name != gone}
    damaged[other] = torch.zeros(tensors[other].shape[0] + 1, *tensors[other].shape[1:])
    save_file(damaged, source / "model.safetensors", {"format": "pt"})
    coverage = check(source, to="hf-memory")
    assert not coverage
    assert [fault.key for fault in coverage.misshapen] == [other]
    assert any(gone in fault.why or gone == fault.key for fault in coverage.missing)


REFUSED = [
    pytest.param(
        "gemma4_text",
        {"enable_moe_block": True, "attention_k_eq_v": True, "num_kv_shared_layers": 1},
        {
            *("activation", "borrowed_keys", "embedding_multiplier", "experts", "keys_as_values"),
            *("layer_scalars", "layer_types", "mixed_experts", "partial_rotary", "post_norms"),
            *("per_layer_inputs", "qk_norm", "query_multiplier", "rope_scaling", "sizes_by_layer"),
            *("sliding_window", "value_norm"),
        },
        id="gemma4_text",
    ),
    pytest.param(
        "mimo_v2_flash",
        {},
        {
            *("experts", "layer_types", "partial_rotary", "sinks", "sizes_by_layer"),
            *("sliding_window", "value_scale"),
        },
        id="mimo_v2_flash",
    ),
    pytest.param(
        "longcat_flash",
        {},
        {"double_layers", "experts", "idle_experts", "latent_attention", "latent_scales"},
        id="longcat_flash",
    ),
    pytest.param(
        "laguna",
        {"moe_router_logit_softcapping": 3.0},
        {
            *("experts", "layer_types", "partial_rotary", "qk_norm", "router_softcap"),
            *("sizes_by_layer", "sliding_window", "softplus_gate"),
        },
        id="laguna",
    ),
    pytest.param(
        "cohere2_moe",
        {"expert_selection_fn": "sigmoid"},
        {
            *("averaged_experts", "experts", "layer_types", "logits_scaling", "no_rope_layers"),
            *("norm", "parallel_residual", "sigmoid_scores", "sliding_window"),
        },
        id="cohere2_moe",
    ),
]


@pytest.mark.parametrize(("model_type", "overrides", "names"), REFUSED)
def test_what_another_class_computes_otherwise_is_refused_by_name(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], names: set[str]
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    for to in ("lingua", "hf-llama"):
        with pytest.raises(NotExpressibleError) as raised:
            convert(source, tmp_path / "out", to=to)
        refused = {str(v).split(":")[0] for label, v in raised.value.facts if label == "refused"}
        held = {"activation", "rope_scaling"} if to == "hf-llama" else set()
        assert refused == names - held
    assert not (tmp_path / "out").exists()


PUBLISHED = {
    "hybrid_layer_pattern": [0, 1, 1],
    "moe_layer_freq": [0, 1, 1],
    "layernorm_epsilon": 1e-5,
    "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True,
    "attention_chunk_size": 7,
    "sliding_window_size": 7,
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "swa_v_head_dim": 10,
    "swa_rope_theta": 10_000.0,
    "routed_scaling_factor": None,
}
"""What MiMo's own file says, in the sizes of the tiny model."""


def test_the_published_words_of_mimo_have_to_say_what_its_class_does(tmp_path: Path) -> None:
    source = save_hf(tiny("mimo_v2_flash"), tmp_path / "hf")
    file = source / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, **PUBLISHED}))
    assert read_spec(source).unaccounted == ()
    assert check(source, to="hf-memory")
    for name, value in PUBLISHED.items():
        if name in {"sliding_window_size", "routed_scaling_factor"}:
            continue
        other = value[::-1] if isinstance(value, list) else not value
        file.write_text(json.dumps({**fields, **PUBLISHED, name: other}))
        assert read_spec(source).unaccounted == (f"{name}: {other!r}",)


def test_layers_that_predict_ahead_are_kept_beside(tmp_path: Path) -> None:
    source = save_hf(tiny("mimo_v2_flash"), tmp_path / "hf")
    ahead = {"model.mtp.layers.0.eh_proj.weight": torch.arange(6.0)}
    save_file({**hf_tensors(source), **ahead}, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "dcp", form="dcp", to="hf-memory")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_longcat_is_published_without_projections_of_idle_experts(tmp_path: Path) -> None:
    """Nothing looks at them, but transformers stacks them with the others and loads no file that
    lacks them; here the first expert's stand in for them."""
    model = tiny("longcat_flash")
    source = save_hf(model, tmp_path / "hf")
    tensors = hf_tensors(source)
    idle = {key for key in tensors if ".experts.5." in key or ".experts.6." in key}
    assert len(idle) == 12
    few = {key: tensor for key, tensor in tensors.items() if key not in idle}
    save_file(few, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_hf(source)

    assert check(source)
    convert(source, tmp_path / "dcp", form="dcp")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf")
    assert_same(hf_tensors(tmp_path / "back"), few)
    assert check(source, to="hf-memory")
    convert(source, tmp_path / "live.pth", to="hf-memory")
    live = torch.load(tmp_path / "live.pth", weights_only=True)
    assert live.keys() == dict(model.state_dict()).keys()
    fresh = tiny("longcat_flash", seed=1)
    load_init_weights(fresh, source, to="hf-memory")
    assert_same(dict(fresh.state_dict()), live)
    assert difference(fresh, model) < RIGHT
    convert(tmp_path / "live.pth", tmp_path / "whole", form="hf", to="hf", assets=source)
    assert hf_tensors(tmp_path / "whole").keys() == tensors.keys()
    assert difference(load_hf(tmp_path / "whole"), model) < RIGHT


def test_longcat_lacks_no_projection_of_an_expert_that_computes(tmp_path: Path) -> None:
    source = save_hf(tiny("longcat_flash"), tmp_path / "hf")
    gone = "model.layers.1.mlp.experts.4.up_proj.weight"
    few = {key: tensor for key, tensor in hf_tensors(source).items() if key != gone}
    save_file(few, source / "model.safetensors", {"format": "pt"})
    assert [fault.key for fault in check(source).missing] == [gone]
    (missing,) = check(source, to="hf-memory").missing
    assert gone in missing.why


def test_keys_that_borrowing_layers_do_not_use_are_dropped_with_a_reason(tmp_path: Path) -> None:
    """The published files hold them, and state the sizes once and not layer by layer."""
    model = tiny("gemma4_text", **MANY["gemma4_text"])
    source = save_hf(model, tmp_path / "hf")
    tensors = hf_tensors(source)
    unused = {
        key.replace("layers.5.", f"layers.{layer}."): tensor.clone()
        for key, tensor in tensors.items()
        if key.startswith(tuple(f"model.layers.5.self_attn.{n}" for n in ("k_", "v_")))
        for layer in range(8, 12)
    }
    save_file({**tensors, **unused}, source / "model.safetensors", {"format": "pt"})
    file = source / "config.json"
    fields = json.loads(file.read_text())
    del fields["per_layer_config"]
    fields |= {"global_head_dim": 24, "num_global_key_value_heads": 3}
    file.write_text(json.dumps(fields))

    report = convert(source, tmp_path / "live.pth", to="hf-memory")
    live = torch.load(tmp_path / "live.pth", weights_only=True)
    assert_same(live, dict(model.state_dict()))
    assert {key for key, _ in report.ignored} == set(unused)
    assert len(unused) == 12
    assert {why for _, why in report.ignored} == {
        "the layer takes keys and values of an earlier one"
    }


def test_sizes_that_do_not_follow_from_the_kind_have_to_be_understood(tmp_path: Path) -> None:
    source = save_hf(tiny("gemma4_text"), tmp_path / "hf")
    file = source / "config.json"
    fields = json.loads(file.read_text())
    fields["per_layer_config"]["2"] = {"head_dim": 32}
    file.write_text(json.dumps(fields))
    (told,) = read_spec(source).unaccounted
    assert told.startswith("per_layer_config: ")
    assert [fault.key for fault in check(source).misshapen] == []
