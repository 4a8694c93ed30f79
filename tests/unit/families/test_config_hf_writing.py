"""config.json as we write it: transformers reads it as we do, and what does not fit is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import transformers

from dcpconv.core.errors import NotExpressibleError
from dcpconv.core.spec import RopeScaling
from dcpconv.families.configs import hf, read_spec, refusals, to_text, write_config
from dcpconv.families.configs.model_types import MODEL_TYPES
from support.models.config_files import LLAMA3, PLAIN, SIZES, assert_same_model, change

LONGROPE = RopeScaling(
    kind="longrope",
    parameters={
        "factor": 2.0,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
    },
)
SPECS = [
    pytest.param({}, id="plain"),
    pytest.param({"tied": True, "head_dim": 24, "n_kv_heads": 6}, id="tied-wide-heads"),
    pytest.param({"qkv_bias": True, "o_bias": True}, id="attention-biases"),
    pytest.param({"mlp_bias": True}, id="mlp-biases"),
    pytest.param({"rope_scaling": RopeScaling(kind="llama3", parameters=LLAMA3)}, id="llama3"),
    pytest.param({"rope_scaling": LONGROPE}, id="longrope"),
    pytest.param({"activation": "gelu"}, id="gelu"),
    pytest.param(
        {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": None},
        id="no-one-named-tokens",
    ),
    pytest.param({"extra": {"initializer_range": 0.5, "attention_dropout": 0.1}}, id="extra"),
    pytest.param({"architecture": "mistral"}, id="mistral"),
    pytest.param({"architecture": "mistral", "sliding_window": 16}, id="mistral-window"),
]


@pytest.mark.parametrize("changes", SPECS)
def test_what_we_write_reads_back_to_the_same_spec(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = change(changes)
    assert refusals("hf", spec) == ()
    (tmp_path / "config.json").write_text(to_text(write_config("hf", spec)))
    assert read_spec(tmp_path) == spec


@pytest.mark.parametrize("changes", SPECS)
def test_transformers_reads_what_we_write(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = change(changes)
    (tmp_path / "config.json").write_text(to_text(write_config("hf", spec)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)

    assert_same_model(spec, config)
    if spec.rope_scaling is not None:
        assert dict(spec.rope_scaling.parameters).items() <= config.rope_parameters.items()
    for name, value in spec.extra.items():
        assert getattr(config, name) == value
    if spec.architecture == "llama":
        assert config.attention_bias == spec.qkv_bias == spec.o_bias
        assert config.mlp_bias == spec.mlp_bias
    if spec.dtype is not None:
        assert str(config.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("changes", SPECS)
def test_what_transformers_saves_reads_back_to_the_same_model(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec = change(changes)
    (tmp_path / "config.json").write_text(to_text(write_config("hf", spec)))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = read_spec(tmp_path / "saved")
    assert saved.model_copy(update={"extra": {}}) == spec.model_copy(update={"extra": {}})


def test_the_fields_that_transformers_4_looks_at_are_there() -> None:
    scaled = change({"rope_scaling": RopeScaling(kind="llama3", parameters=LLAMA3)})
    fields = write_config("hf", scaled)
    assert fields["rope_theta"] == 490_000.0
    assert fields["rope_scaling"] == LLAMA3 | {"rope_type": "llama3"}
    assert fields["torch_dtype"] == "bfloat16"
    assert fields["bos_token_id"] == 3
    assert fields["pad_token_id"] is None
    assert write_config("hf", PLAIN)["rope_scaling"] is None


def test_the_text_does_not_depend_on_the_order_of_what_is_carried_over() -> None:
    one = change({"extra": {"a": 1, "b": [2]}})
    other = change({"extra": {"b": [2], "a": 1}})
    text = to_text(write_config("hf", one))
    assert text == to_text(write_config("hf", other))
    assert text.endswith('"b": [\n    2\n  ]\n}\n')


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        pytest.param("hf-llama", {"architecture": "mistral"}, [], id="mistral-without-window"),
        pytest.param("hf-llama", {"sliding_window": 16}, ["sliding_window"], id="window"),
        pytest.param("hf-llama", {"architecture": "mistral", "sliding_window": 16}, [],
                     id="mistral-keeps-its-window"),
        pytest.param("hf-llama", {"sliding_window": 64}, [], id="window-that-does-not-bite"),
        pytest.param("hf-llama", {"qkv_bias": True}, ["qkv_bias"], id="only-qkv"),
        pytest.param("hf-llama", {"o_bias": True}, ["o_bias"], id="only-o"),
        pytest.param("hf-llama", {"n_heads": 14, "head_dim": 8}, ["n_heads"], id="odd-heads"),
        pytest.param("hf-mistral", {"mlp_bias": True, "qk_norm": True}, ["mlp_bias", "qk_norm"],
                     id="two-at-once"),
        pytest.param("hf", {"architecture": "novel"}, ["architecture"], id="unknown-class"),
        pytest.param("some-keymap", {"qk_norm": True}, [], id="family-without-a-file"),
    ],
)  # fmt: skip
def test_refusals(family: str, changes: dict[str, Any], names: list[str]) -> None:
    assert [refusal.name for refusal in refusals(family, change(changes))] == names


@pytest.mark.parametrize(
    ("family", "architecture", "written"),
    [
        ("hf", "llama", "llama"),
        ("hf", "mistral", "mistral"),
        ("hf-llama", "mistral", "mistral"),
        ("hf-mistral", "llama", "mistral"),
        ("hf-llama", "novel", "llama"),
    ],
)
def test_the_class_that_is_written(family: str, architecture: str, written: str) -> None:
    fields = write_config(family, change({"architecture": architecture}))
    assert fields["model_type"] == written


def test_writing_for_a_class_we_do_not_know_lists_those_we_do() -> None:
    with pytest.raises(NotExpressibleError) as raised:
        write_config("hf", change({"architecture": "novel"}))
    known = [name for name, kind in MODEL_TYPES.items() if kind.expresses is not None]
    assert raised.value.facts == tuple(("known", name) for name in known)


ERNIE = {"model_type": "ernie4_5_moe", "num_key_value_heads": 2} | SIZES | {"num_hidden_layers": 5}


def test_wherever_ernie_puts_experts_is_written_back() -> None:
    path = Path("config.json")
    for start, end, step in itertools.product(range(7), range(-1, 7), range(1, 7)):
        stated = {
            "moe_layer_start_index": start,
            "moe_layer_end_index": end,
            "moe_layer_interval": step,
        }
        spec = hf.read(ERNIE | stated, path)
        assert refusals("hf", spec) == ()
        again = hf.read(write_config("hf", spec), path)
        assert again.experts == spec.experts, stated


@pytest.mark.parametrize("dense", [(2,), (0, 2, 3), (1, 3)])
def test_other_places_of_experts_are_refused(dense: tuple[int, ...]) -> None:
    spec = hf.read(ERNIE, Path("config.json"))
    assert spec.experts is not None
    experts = spec.experts.model_copy(update={"dense_layers": dense})
    found = refusals("hf", spec.model_copy(update={"experts": experts}))
    assert [refusal.name for refusal in found] == ["experts"]
    assert "experts at a stride" in found[0].reason
