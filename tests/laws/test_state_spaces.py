"""Classes whose layers keep a state: the same weights under every name they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dcpconv import check, convert, fingerprint, load_init_weights
from dcpconv.core.errors import NotExpressibleError
from dcpconv.families.configs import read_spec
from dcpconv.families.keymaps import resolve_family
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.parameter_shapes import expected
from dcpconv.sources.recognition import recognise
from support.checkpoints.families import (
    RIGHT,
    assert_every_form_holds,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import save_hf
from support.models.nested_models import small
from support.models.state_space_cases import (
    LONG,
    STATE_SPACE_CASES,
    STATE_SPACES,
    as_first_published,
)

WIDE = ("in_proj.weight", "k_proj.weight")


def saved(model_type: str) -> str:
    """What save_pretrained writes: Kimi-Linear otherwise than it is published."""
    return "hf-saved" if model_type == "kimi_linear" else "hf"


def empty(model: Any) -> Any:
    """A model of the same config whose parameters have no values yet."""
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize("model_type", STATE_SPACES)
def test_every_form_and_both_namings_hold_the_same_bits(tmp_path: Path, model_type: str) -> None:
    model = small(model_type, **LONG[model_type]).to(torch.bfloat16)
    assert_every_form_holds(model, tmp_path, saved=saved(model_type))
    assert fingerprint(tmp_path / "back").digest == fingerprint(tmp_path / "hf").digest


@pytest.mark.parametrize(("model_type", "overrides"), STATE_SPACE_CASES)
def test_both_namings_compute_the_same(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model = small(model_type, **overrides)
    source = save_hf(model, tmp_path / "hf")
    assert check(source)
    assert check(source, against=model)
    convert(source, tmp_path / "live.pth", to="hf-memory")
    assert_same(torch_tensors(tmp_path / "live.pth"), dict(model.state_dict()))

    convert(tmp_path / "live.pth", tmp_path / "back", form="hf", to="hf", assets=source)
    back = load_hf(tmp_path / "back")
    assert difference(back, model) < RIGHT
    assert type(back) is type(model)
    fresh = empty(model)
    load_init_weights(fresh, source)
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize(("model_type", "overrides"), STATE_SPACE_CASES)
def test_the_config_alone_says_every_key_and_shape(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], where: str
) -> None:
    model = small(model_type, **overrides)
    source = save_hf(model, tmp_path)
    spec = read_spec(source)
    is_disk = where == "disk"
    table = resolve_family(saved(model_type) if is_disk else "hf-memory", model_type)
    tensors = hf_tensors(source) if is_disk else dict(model.state_dict())
    real = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if spec.tied:
        real.pop("lm_head.weight", None)
    assert {key: shape for key, shape, _ in expected(table, spec)} == real


@pytest.mark.parametrize("model_type", STATE_SPACES)
def test_check_accounts_for_every_key_and_size(tmp_path: Path, model_type: str) -> None:
    source = save_hf(small(model_type), tmp_path / "hf")
    tensors = hf_tensors(source)
    gone = next(key for key in tensors if key.endswith(("A_log", "conv.conv.weight")))
    wide = next(key for key in tensors if key.endswith(WIDE))
    damaged = {name: tensor for name, tensor in tensors.items() if name != gone}
    damaged[wide] = torch.zeros(tensors[wide].shape[0] + 1, *tensors[wide].shape[1:])
    save_file(damaged, source / "model.safetensors", {"format": "pt"})
    coverage = check(source, to="hf-memory")
    assert not coverage
    assert [fault.key for fault in coverage.misshapen] == [
        fault.key for fault in coverage.misshapen if fault.key.endswith(WIDE)
    ]
    assert any(gone in fault.why or fault.key == gone for fault in coverage.missing)


@pytest.mark.parametrize("model_type", STATE_SPACES)
def test_the_words_of_the_first_files_mean_the_same(tmp_path: Path, model_type: str) -> None:
    model = small(model_type, **LONG[model_type])
    source = save_hf(model, tmp_path / "hf")
    spec = read_spec(source)
    config = source / "config.json"
    config.write_text(json.dumps(as_first_published(json.loads(config.read_text()))))
    first = read_spec(source)
    assert first.model_copy(update={"extra": spec.extra}) == spec
    table = resolve_family("hf", model_type)
    assert list(expected(table, first)) == list(expected(table, spec))

    convert(source, tmp_path / "live.pth", to="hf-memory")
    convert(tmp_path / "live.pth", tmp_path / "back", form="hf", to="hf", assets=source)
    assert difference(load_hf(tmp_path / "back"), model) < RIGHT


KEYS_ALONE = [
    *(pytest.param(name, {}, True, id=name) for name in STATE_SPACES),
    *(pytest.param(name, LONG[name], True, id=f"{name}-long") for name in LONG),
    pytest.param("falcon_h1", {"mamba_rms_norm": True}, True, id="falcon_h1-normed"),
    pytest.param("granitemoehybrid", {"num_local_experts": 0}, True, id="granite-dense"),
    pytest.param(
        "granitemoehybrid",
        {"layer_types": ["full_attention"] * 4, "num_local_experts": 0},
        False,
        id="granite-dense-attention",
    ),
    pytest.param("nemotron_h", {"layers_block_type": ["moe", "mlp"] * 2}, False, id="no-states"),
]
"""Class, switches, and whether its keys are like no other's."""


@pytest.mark.parametrize("form", ["hf", "memory"])
@pytest.mark.parametrize(("model_type", "overrides", "is_alone"), KEYS_ALONE)
def test_keys_alone_are_never_taken_for_another_class(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], form: str, *, is_alone: bool
) -> None:
    model = small(model_type, **overrides)
    source = save_hf(model, tmp_path / "hf")
    (source / "config.json").unlink()
    if form == "memory":
        source = tmp_path / "model.pth"
        torch.save(dict(model.state_dict()), source)
    found = recognise(open_checkpoint(source)).keymap
    assert (found.architectures if found else ()) == ((model_type,) if is_alone else ())


@pytest.mark.parametrize("to", ["hf-llama", "lingua", "hf-qwen3_next"])
@pytest.mark.parametrize("model_type", STATE_SPACES)
def test_no_class_without_a_state_takes_it(tmp_path: Path, model_type: str, to: str) -> None:
    source = save_hf(small(model_type), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for label, v in raised.value.facts if label == "refused"}
    assert refused & {"architecture", "state_space", "short_convolution"}
    assert not any(name.startswith("config.") for name in refused), refused


def test_kimi_linear_is_published_otherwise_than_transformers_saves_it(tmp_path: Path) -> None:
    model = small("kimi_linear", **LONG["kimi_linear"])
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "published", form="hf", to="hf")
    ours, theirs = hf_tensors(tmp_path / "published"), hf_tensors(source)
    plain = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert ours.keys() - theirs.keys() == plain
    assert difference(load_hf(tmp_path / "published"), model) < RIGHT
    convert(tmp_path / "published", tmp_path / "back", form="hf", to="hf-saved")
    assert_same(hf_tensors(tmp_path / "back"), theirs)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_mamba_2_under_the_names_of_its_first_package(tmp_path: Path, *, tied: bool) -> None:
    """transformers takes these names too, when it loads a state dict."""
    model = small("mamba2", **LONG["mamba2"], tie_word_embeddings=tied)
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to="mamba_ssm")
    convert(source, tmp_path / "first.pth", to="mamba_ssm")
    first = torch_tensors(tmp_path / "first.pth")
    assert "backbone.embedding.weight" in first
    assert "lm_head.weight" in first
    assert check(tmp_path / "first.pth", to="hf-mamba2")

    fresh = small("mamba2", **LONG["mamba2"], tie_word_embeddings=tied, seed=1)
    fresh.load_state_dict(dict(first))
    assert difference(fresh, model) < RIGHT
    convert(tmp_path / "first.pth", tmp_path / "back", form="hf", to="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


MICRO: dict[str, Any] = {
    "layer_types": ["full_attention"] * 4,
    "num_local_experts": 0,
    "position_embedding_type": "rope",
}
"""Granite 4 without states and experts, which Granite's own class computes too."""


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"attention_bias": True, "tie_word_embeddings": True}, id="biased-tied"),
        pytest.param(
            {"num_hidden_layers": 11, "layer_types": ["full_attention"] * 11}, id="eleven-layers"
        ),
    ],
)
def test_a_granite_4_of_attention_alone_is_a_granite(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    model = small("granitemoehybrid", **{**MICRO, **overrides})
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to="hf-granite")
    convert(source, tmp_path / "granite", form="hf", to="hf-granite")
    other = load_hf(tmp_path / "granite")
    assert other.config.model_type == "granite"
    assert difference(other, model) < RIGHT
    assert fingerprint(tmp_path / "granite").digest == fingerprint(source).digest
    with pytest.raises(NotExpressibleError, match="GraniteMoeHybridForCausalLM is another model"):
        convert(tmp_path / "granite", tmp_path / "back", form="hf", to="hf-granitemoehybrid")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        pytest.param({"position_embedding_type": None}, {"positions"}, id="no-positions"),
        pytest.param({"num_local_experts": 5}, {"experts"}, id="experts"),
        pytest.param(
            {"layer_types": ["linear_attention", "full_attention"] * 2},
            {"layer_types", "state_space"},
            id="states",
        ),
    ],
)
def test_any_other_granite_4_is_refused_by_name(
    tmp_path: Path, overrides: dict[str, Any], names: set[str]
) -> None:
    source = save_hf(small("granitemoehybrid", **{**MICRO, **overrides}), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", form="hf", to="hf-granite")
    refused = {str(v).split(":")[0] for label, v in raised.value.facts if label == "refused"}
    assert refused == names
