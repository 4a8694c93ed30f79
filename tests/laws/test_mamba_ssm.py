"""Mamba 2 as state-spaces/mamba publishes it and as transformers holds it: one model, two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import check, convert, fingerprint, load_init_weights
from dcpconv.conversion.parameters import parameters
from dcpconv.core.errors import AmbiguousFamilyError, NotExpressibleError
from dcpconv.families.configs import read_spec
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import save_hf
from support.models.mamba_ssm import MambaConfig, MambaLMHeadModel, mamba_ssm
from support.models.nested_models import small

CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"n_layer": 11}, id="eleven-layers"),
    pytest.param({"tie_embeddings": False}, id="untied"),
    pytest.param({"pad_vocab_size_multiple": 16, "residual_in_fp32": False}, id="padded"),
    pytest.param({"ssm_cfg": {"bias": True}}, id="biased"),
    pytest.param({"ssm_cfg": {"conv_bias": False, "ngroups": 1}}, id="no-convolution-bias"),
    pytest.param({"ssm_cfg": {"expand": 1, "headdim": 16, "d_conv": 4}}, id="narrow"),
    pytest.param({"ssm_cfg": {"dt_limit": [0.1, 0.5]}}, id="bounded-steps"),
]


def published(model: MambaLMHeadModel, directory: Path, **fields: Any) -> Path:
    """What ``MambaLMHeadModel.save_pretrained`` leaves."""
    directory.mkdir()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    text = json.dumps({**model.config.as_json(), **fields}, indent=4)
    (directory / "config.json").write_text(text)
    return directory


@pytest.mark.parametrize("fields", CASES)
def test_what_the_package_publishes_transformers_computes_alike(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = mamba_ssm(**fields)
    source = published(model, tmp_path / "in")
    assert check(source)
    convert(source, tmp_path / "hf", form="hf", to="hf")
    found = load_hf(tmp_path / "hf")
    assert type(found).__name__ == "Mamba2ForCausalLM"
    assert difference(found, model) < RIGHT
    assert fingerprint(tmp_path / "hf").digest == fingerprint(source).digest

    fresh = small("mamba2")
    fresh = type(fresh)(found.config)
    load_init_weights(fresh, source)
    assert_same(dict(fresh.state_dict()), dict(found.state_dict()))

    convert(tmp_path / "hf", tmp_path / "back.pth", to="mamba_ssm")
    assert_same(torch_tensors(tmp_path / "back.pth"), dict(model.state_dict()))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"num_hidden_layers": 11, "tie_word_embeddings": True}, id="eleven-tied"),
        pytest.param({"use_bias": True, "use_conv_bias": False}, id="biases"),
        pytest.param({"time_step_limit": (0.1, 0.5)}, id="bounded-steps"),
        pytest.param({"time_step_limit": (0.1, float("inf"))}, id="no-upper-bound"),
    ],
)
def test_its_own_config_is_written_for_what_transformers_saves(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    model = small("mamba2", **overrides)
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to="mamba_ssm")
    convert(source, tmp_path / "dcp", form="dcp", to="mamba_ssm")
    written = json.loads((tmp_path / "dcp/config.json").read_text())
    assert json.loads(parameters(source, to="mamba_ssm").text) == written

    config = MambaConfig(**written)  # the package takes exactly its own fields
    config.ssm_cfg = {n: v for n, v in config.ssm_cfg.items() if not n.startswith(("dt_m", "dt_i"))}
    theirs = MambaLMHeadModel(config).eval()
    convert(tmp_path / "dcp", tmp_path / "model.pth")
    theirs.load_state_dict(torch_tensors(tmp_path / "model.pth"))
    assert difference(theirs, model) < RIGHT
    convert(tmp_path / "dcp", tmp_path / "back", form="hf", to="hf")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), model) < RIGHT


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        pytest.param({"ssm_cfg": {}}, "mamba", id="mamba-1"),
        pytest.param({"ssm_cfg": {"layer": "Mamba3"}}, "mamba3", id="mamba-3"),
        pytest.param({"attn_layer_idx": [1]}, "mamba2 with attn_layer_idx", id="hybrid"),
        pytest.param(
            {"d_intermediate": 152, "rms_norm": False},
            "mamba2 with d_intermediate and rms_norm off",
            id="feed-forward",
        ),
        pytest.param(
            {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True, "rmsnorm": False}},
            "mamba2 with ssm_cfg.D_has_hdim and ssm_cfg.rmsnorm",
            id="other-tensors",
        ),
    ],
)
def test_models_with_other_tensors_keep_their_names_and_are_named(
    tmp_path: Path, fields: dict[str, Any], architecture: str
) -> None:
    source = published(mamba_ssm(), tmp_path / "in", **fields)
    assert read_spec(source).architecture == architecture
    convert(source, tmp_path / "dcp", form="dcp")
    with pytest.raises(AmbiguousFamilyError) as raised:
        convert(source, tmp_path / "hf", form="hf", to="hf")
    assert raised.value.headline == f"no naming table is for {architecture}"


@pytest.mark.parametrize(
    "own",
    [
        pytest.param({"norm_before_gate": True}, id="norm-first"),
        pytest.param({"novel": 3}, id="unheard-of"),
    ],
)
def test_a_field_that_transformers_has_nothing_for_is_refused_by_name(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    model = mamba_ssm()
    source = published(model, tmp_path / "in", ssm_cfg={**model.config.ssm_cfg, **own})
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "hf", form="hf", to="hf")
    refused = [str(value) for label, value in raised.value.facts if label == "refused"]
    assert [text.split(":")[0] for text in refused] == [f"config.ssm_cfg.{name}" for name in own]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        pytest.param({"layer_norm_epsilon": 1e-6}, "norm_eps: 1e-06", id="epsilon"),
        pytest.param({"hidden_act": "gelu"}, "activation: gelu", id="activation"),
    ],
)
def test_what_the_package_fixes_is_refused_by_name(
    tmp_path: Path, overrides: dict[str, Any], reason: str
) -> None:
    source = save_hf(small("mamba2", **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out.pth", to="mamba_ssm")
    assert any(str(value).startswith(reason) for label, value in raised.value.facts)
