"""From one class of transformers into another: what RoPE turns, and how it is stretched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from support.checkpoints.families import RIGHT, assert_same, difference, hf_tensors, load_hf
from support.models.hf_models import save_hf, tiny

TRAINED: dict[str, Any] = {"original_max_position_embeddings": 16}
"""Shorter than the tokens of ``difference``, so that stretching is seen."""

FACTORS = {
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [2.0 + 0.2 * n for n in range(8)],
}
LONGROPE = {"rope_theta": 1e4, "rope_type": "longrope", **FACTORS}


@pytest.mark.parametrize("to", ["hf-llama", "hf-glm"])
@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.3}], ids=["usual", "own-factor"])
def test_longrope_is_stretched_from_the_same_length_there_and_back(
    tmp_path: Path, to: str, more: dict[str, float]
) -> None:
    model = tiny("phi3", rope_parameters={**LONGROPE, **more}, **TRAINED)
    source = save_hf(model, tmp_path / "phi3")
    convert(source, tmp_path / "out", form="hf", to=to)
    assert difference(load_hf(tmp_path / "out"), model) < RIGHT
    convert(tmp_path / "out", tmp_path / "back", form="hf", to="hf-phi3")
    assert difference(load_hf(tmp_path / "back"), model) < RIGHT
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_phi3_of_transformers_4_states_the_first_length_outside(tmp_path: Path, kind: str) -> None:
    model = tiny("phi3", rope_parameters=LONGROPE, **TRAINED)
    source = save_hf(model, tmp_path / "phi3", config_style="4")
    config = json.loads((source / "config.json").read_text())
    config["rope_scaling"] = {"type": kind, **FACTORS}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "llama", form="hf", to="hf-llama")
    assert difference(load_hf(tmp_path / "llama"), model) < RIGHT
    convert(tmp_path / "llama", tmp_path / "back", form="hf", to="hf-phi3")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["rope_scaling"] == {"type": "longrope", **FACTORS}
    assert written["original_max_position_embeddings"] == 16


LINEAR = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("model_type", "overrides", "to", "refused"),
    [
        pytest.param("llama", {"rope_parameters": LINEAR}, "hf-phi3", "rope_scaling", id="linear"),
        pytest.param(
            "glm", {"attention_bias": False}, "hf-phi3", "partial_rotary", id="glm-to-phi3"
        ),
        pytest.param(
            "phi3", {"partial_rotary_factor": 0.5}, "hf-glm", "partial_rotary", id="phi3-to-glm"
        ),
        pytest.param(
            "phi3", {"partial_rotary_factor": 0.5}, "chatglm3", "partial_rotary", id="to-chatglm"
        ),
    ],
)
def test_what_another_class_turns_or_stretches_otherwise_is_refused(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], to: str, refused: str
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError, match=refused):
        convert(source, tmp_path / "out", to=to)
    assert [fault.key for fault in check(source, to=to).refused] == [refused]


BIASES = ["qkv_bias", "o_bias"]


@pytest.mark.parametrize(
    ("model_type", "overrides", "to", "allow"),
    [
        pytest.param("llama", {"attention_bias": True}, "lingua", BIASES, id="biases-to-lingua"),
        pytest.param("llama", {"mlp_bias": True}, "meta", ["mlp_bias"], id="biases-to-meta"),
        pytest.param("qwen2", {}, "hf-llama", ["qkv_bias"], id="a-switch-that-would-add-more"),
        pytest.param("glm", {}, "lingua", ["qkv_bias", "partial_rotary"], id="glm-to-lingua"),
    ],
)
def test_a_feature_that_is_allowed_to_be_left_out_takes_its_tensors_with_it(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], to: str, allow: list[str]
) -> None:
    model = tiny(model_type, **overrides)
    source = save_hf(model, tmp_path / "hf")
    with pytest.raises(NotExpressibleError, match=allow[0]):
        convert(source, tmp_path / "out", form="dcp", to=to)
    assert check(source, to=to, allow=allow)
    report = convert(source, tmp_path / "out", form="dcp", to=to, allow=allow)
    biases = {key for key in hf_tensors(source) if key.endswith(".bias")}
    assert {key for key, _ in report.ignored} == biases

    convert(tmp_path / "out", tmp_path / "plain", form="hf", to="hf-llama")
    assert not biases & hf_tensors(tmp_path / "plain").keys()
    if model_type == "glm":
        return  # heads turned in part are another model, whatever becomes of the biases
    for name, parameter in model.named_parameters():
        if name in biases:
            parameter.data.zero_()
    assert difference(load_hf(tmp_path / "plain"), model) < RIGHT


@pytest.mark.parametrize(
    ("model_type", "to", "said"),
    [
        pytest.param("llama", "meta", "dcpconv params {source} --to meta", id="params.json"),
        pytest.param("glm", "chatglm3", "dcpconv params {source} --to chatglm3", id="config.json"),
        pytest.param("qwen3_moe", "torchtitan-qwen3", "expert width 52", id="no-file"),
    ],
)
def test_one_file_has_nothing_beside_it_and_says_where_the_sizes_are(
    tmp_path: Path, model_type: str, to: str, said: str
) -> None:
    source = save_hf(tiny(model_type), tmp_path / "hf")
    report = convert(source, tmp_path / "out.pth", to=to)
    assert [note for note in report.notes if said.format(source=source) in note]


def test_the_tokenizer_goes_along_to_another_class_and_its_code_does_not(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "llama")
    kept = {"tokenizer.json": "{}", "generation_config.json": '{"temperature": 0.5}'}
    for name, text in {**kept, "modeling_llama.py": "raise SystemExit"}.items():
        (source / name).write_text(text)
    convert(source, tmp_path / "glm", form="hf", to="hf-glm")
    names = {file.name for file in (tmp_path / "glm").iterdir()}
    assert names == {"config.json", "model.safetensors", *kept}
    assert {name: (tmp_path / "glm" / name).read_text() for name in kept} == kept
