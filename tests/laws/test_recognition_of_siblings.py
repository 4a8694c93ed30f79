"""Keys alone, without any parameter file: a class is recognised, or those it may be are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import check, convert
from dcpconv.core.errors import AmbiguousFamilyError, DcpconvError, SpecError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.recognition import recognise
from support.models.hf_models import MODEL_TYPES, save_hf, tiny
from support.models.nested_models import NESTED, small

AS_LLAMA = frozenset(
    {
        *("smollm3", "ernie4_5", "helium", "internlm3", "seed_oss", "cwm", "ministral3"),
        *("granite", "gemma"),
    }
)
TAKEN_FOR = {
    **dict.fromkeys(AS_LLAMA, "hf-llama"),
    "granitemoe": "hf-granitemoeshared",
    "dots1": "hf-glm4_moe",
    "solar_open": "hf-glm4_moe",
    "mellum": "hf-qwen3_moe",
    "glm4_moe_lite": "hf-deepseek_v3",
    "glm_moe_dsa": "hf-deepseek_v32",
    "exaone_moe in memory": "hf-glm4_moe",
}
"""Class -> table of a more common one with the same keys; reports name both."""

UNDECIDED = {
    **{name: {"hf-qwen2_vl", "hf-qwen2_5_vl"} for name in ("qwen2_vl", "qwen2_5_vl")},
    **{
        name: {"hf-mistral3", "hf-internvl", "hf-llava"}
        for name in ("mistral3", "internvl", "llava")
    },
}
"""Classes with the same keys of which none is more common; a conversion asks."""

AS_STORED = {"kimi_k25 on disk"}
"""What save_pretrained writes and no one publishes."""


def bare(model_type: str, directory: Path, **overrides: object) -> tuple[Path, Path]:
    """The files of a class and its state dict, without a parameter file."""
    make: Any = tiny if model_type in MODEL_TYPES else small
    model = make(model_type, **overrides)
    disk = save_hf(model, directory / "hf")
    (disk / "config.json").unlink()
    torch.save(dict(model.state_dict()), directory / "model.pth")
    return disk, directory / "model.pth"


def plain(name: str) -> str:
    return name.replace("hf-memory-", "hf-")


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *(n for n in NESTED if n not in MODEL_TYPES)])
def test_no_class_is_taken_for_another_in_silence(tmp_path: Path, model_type: str) -> None:
    for where, place in zip(("on disk", "in memory"), bare(model_type, tmp_path), strict=True):
        found = recognise(open_checkpoint(place))
        case = f"{model_type} {where}"
        other = TAKEN_FOR.get(case, TAKEN_FOR.get(model_type))
        fitting = UNDECIDED.get(case, UNDECIDED.get(model_type))
        if case in AS_STORED:
            assert found.keymap is None
        elif fitting is not None:
            with pytest.raises(AmbiguousFamilyError) as raised:
                found.require_keymap()
            assert {plain(str(v)) for label, v in raised.value.facts if label == "fits"} == fitting
        elif other is not None:
            table = found.require_keymap()
            assert plain(table.name) == other
            (doubt,) = found.doubts
            assert table.name in doubt
            assert any(model_type in rival.architectures for rival in found.rivals)
            assert all(rival.name in doubt for rival in found.rivals)
        else:
            tables = (found.require_keymap(), *found.same)
            assert model_type in {name for table in tables for name in table.architectures}


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        pytest.param("olmoe", {"num_key_value_heads": 6}, id="olmoe"),
        pytest.param("olmo2", {"num_key_value_heads": 6}, id="olmo2"),
        pytest.param("exaone4", {}, id="exaone4"),
        pytest.param("qwen3_moe", {}, id="qwen3_moe"),
    ],
)
def test_the_length_of_norms_tells_whole_widths_from_heads(
    tmp_path: Path, model_type: str, overrides: dict[str, object]
) -> None:
    for place in bare(model_type, tmp_path, **overrides):
        assert recognise(open_checkpoint(place)).require_keymap().architectures[0] == model_type


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        pytest.param("bamba", {}, id="bamba"),
        pytest.param("bamba", {"attn_layer_indices": [], "use_cache": False}, id="bamba-states"),
        pytest.param("falcon_h1", {}, id="falcon_h1"),
        pytest.param("falcon_h1", {"mamba_rms_norm": True}, id="falcon_h1-normed"),
    ],
)
def test_layers_with_both_blocks_are_not_layers_with_one_of_them(
    tmp_path: Path, model_type: str, overrides: dict[str, object]
) -> None:
    disk, memory = bare(model_type, tmp_path, **overrides)
    for place in (disk, memory):
        coverage = check(place)
        assert coverage
        assert coverage.source == f"hf-{model_type}"


def test_no_config_is_made_up_for_a_class_whose_fields_no_shape_says(tmp_path: Path) -> None:
    disk, _ = bare("falcon_h1", tmp_path)
    numbers = "heads=6,kv_heads=2,eps=1e-5,theta=1e4"
    with pytest.raises(SpecError, match="neither shapes nor numbers say") as raised:
        convert(disk, tmp_path / "out", form="hf", spec=numbers)
    assert ("lacks", "the config.json of a FalconH1ForCausalLM") in raised.value.facts
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["lingua", "meta"])
def test_a_conversion_names_the_classes_that_it_may_be(tmp_path: Path, to: str) -> None:
    disk, _ = bare("gemma", tmp_path)
    numbers = "heads=6,kv_heads=2,eps=1e-6,theta=1e4"
    report = convert(disk, tmp_path / "out", to=to, form="dcp", spec=numbers)
    (note,) = (note for note in report.notes if "taken for" in note)
    assert note.startswith("taken for hf-llama, since no file says which model this is; ")
    assert "hf-gemma" in note
    assert "--from NAME" in note
    told = convert(disk, tmp_path / "told", to=to, form="dcp", spec=numbers, from_="hf-llama")
    assert not any("taken for" in note for note in told.notes)
    with pytest.raises(DcpconvError, match="cannot express this model"):
        convert(disk, tmp_path / "no", to=to, form="dcp", spec=numbers, from_="hf-gemma")
    copied = convert(disk, tmp_path / "copy", form="dcp")
    assert not any("taken for" in note for note in copied.notes)


@pytest.mark.parametrize(("model_type", "tokens"), [("ernie4_5", 103_424), ("helium", 48_000)])
def test_neighbours_that_rotate_are_asked_for_where_the_vocabulary_speaks_for_them(
    tmp_path: Path, model_type: str, tokens: int
) -> None:
    disk, _ = bare(model_type, tmp_path, vocab_size=tokens, hidden_size=24, head_dim=4)
    with pytest.raises(AmbiguousFamilyError) as raised:
        convert(disk, tmp_path / "out", to="lingua", form="dcp", spec="heads=6,kv_heads=2")
    fits = [value for label, value in raised.value.facts if label == "fits"]
    assert fits[:2] == [f"hf-{model_type}", "hf-llama"]
    assert raised.value.hint == "choose one with --from NAME"
