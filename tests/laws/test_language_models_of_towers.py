"""The language model of a model with a tower: renamed alone, its tower kept beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import NotExpressibleError
from lingua_model import LinguaModel
from support.checkpoints.families import RIGHT, assert_same, difference, hf_tensors, load_hf
from support.models.hf_models import save_hf
from support.models.nested_models import small
from support.versions import load_alone

ELEVEN = {"num_hidden_layers": 11}
QWEN3 = {"model_type": "qwen3", "head_dim": 24}
LLAMA = {"model_type": "llama", "head_dim": 24, "attention_bias": True, "mlp_bias": True}
CASES = [
    pytest.param("qwen3_5", {}, "hf-qwen3_5_text", id="qwen3_5"),
    pytest.param("qwen3_5_moe", {}, "hf-qwen3_5_moe_text", id="qwen3_5_moe"),
    pytest.param("qwen2_vl", {}, "hf-qwen2", id="qwen2_vl"),
    pytest.param("qwen2_5_vl", {}, "hf-qwen2", id="qwen2_5_vl"),
    pytest.param("qwen2_5_vl", ELEVEN, "hf-qwen2", id="qwen2_5_vl-eleven-layers"),
    pytest.param("qwen3_vl", {}, "hf-qwen3", id="qwen3_vl"),
    pytest.param("qwen3_vl", {"attention_bias": True}, "hf-qwen3", id="qwen3_vl-biased"),
    pytest.param("qwen3_vl_moe", {"num_experts": 12}, "hf-qwen3_moe", id="qwen3_vl_moe"),
    pytest.param("gemma3", {}, "hf-gemma3_text", id="gemma3"),
    pytest.param(
        "gemma3",
        {"num_hidden_layers": 13, "attention_bias": True, "head_dim": 24},
        "hf-gemma3_text",
        id="gemma3-thirteen-layers-biased",
    ),
    pytest.param("gemma4", {}, "hf-gemma4_text", id="gemma4"),
    pytest.param(
        "gemma4",
        {
            "num_hidden_layers": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 6,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
        },
        "hf-gemma4_text",
        id="gemma4-twelve-layers-every-switch",
    ),
    pytest.param("llama4", {}, "hf-llama4_text", id="llama4"),
    pytest.param(
        "llama4",
        {
            "num_hidden_layers": 12,
            "num_local_experts": 11,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 1,
            "head_dim": 24,
            "attention_bias": True,
        },
        "hf-llama4_text",
        id="llama4-twelve-layers-eleven-experts-biased",
    ),
    pytest.param(
        "llama4",
        {"use_qk_norm": False, "attn_temperature_tuning": False, "moe_layers": [0, 3]},
        "hf-llama4_text",
        id="llama4-no-norms",
    ),
    pytest.param("mistral3", {"head_dim": 24}, "hf-llama", id="mistral3"),
    pytest.param("mistral3", ELEVEN, "hf-llama", id="mistral3-eleven-layers"),
    pytest.param("internvl", {}, "hf-qwen2", id="internvl-qwen2"),
    pytest.param("internvl", QWEN3, "hf-qwen3", id="internvl-qwen3"),
    pytest.param("internvl", LLAMA, "hf-llama", id="internvl-llama"),
    pytest.param("llava", {}, "hf-llama", id="llava"),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("model_type", "overrides", "to"), CASES)
def test_the_language_model_alone_computes_the_same_and_the_tower_comes_back(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], to: str, *, tied: bool
) -> None:
    model = small(model_type, **overrides, tie_word_embeddings=tied)
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to=to)
    convert(source, tmp_path / "text", form="hf", to=to)
    written = json.loads((tmp_path / "text/config.json").read_text())
    assert f"hf-{written['model_type']}" == to
    alone = load_hf(tmp_path / "text")
    assert difference(alone, model) < RIGHT

    kept = [f for f in (tmp_path / "text").glob("*.safetensors") if not f.name.startswith("model")]
    assert len(kept) == 1
    back = tmp_path / "back"
    convert(tmp_path / "text", back, form="hf", to=f"hf-{model_type}", from_=to, assets=source)
    assert_same(hf_tensors(back), hf_tensors(source))

    with torch.device("meta"):
        fresh = type(alone)(alone.config)
    in_memory = to.replace("hf-", "hf-memory-") if "moe" in to else to
    load_init_weights(fresh, source, to=in_memory)
    assert_same(dict(fresh.state_dict()), dict(alone.state_dict()))


def test_one_file_has_no_place_for_towers_and_the_note_says_how_to_get_them(tmp_path: Path) -> None:
    source = save_hf(small("llama4"), tmp_path / "hf")
    report = convert(source, tmp_path / "text.pth", to="hf-llama4_text")
    (note,) = [note for note in report.notes if "no place" in note]
    assert "--only multi_modal_projector or vision_model converts them" in note
    convert(source, tmp_path / "tower.pth", only="vision_model")
    keys = hf_tensors(source).keys()
    assert torch.load(tmp_path / "tower.pth", weights_only=True).keys() == {
        key for key in keys if key.startswith("vision_model.")
    }


@pytest.mark.parametrize("model_type", ["mistral3", "llava"])
def test_lingua_holds_a_plain_language_model_of_a_tower(tmp_path: Path, model_type: str) -> None:
    hf = small(model_type)
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "lingua", to="lingua")
    model = LinguaModel.from_params(json.loads((tmp_path / "lingua/params.json").read_text()))
    state = model.state_dict()
    load_alone({"model": state}, checkpoint_id=tmp_path / "lingua")
    model.load_state_dict(state)
    assert difference(model.eval(), hf) < RIGHT
    assert [f.name for f in (tmp_path / "lingua").glob("*.safetensors")] == ["aside.safetensors"]


@pytest.mark.parametrize(
    ("model_type", "to", "names"),
    [
        ("qwen2_5_vl", "lingua", {"qkv_bias"}),
        ("qwen3_vl", "hf-llama", {"qk_norm"}),
        ("qwen3_vl", "hf-qwen2_5_vl", {"architecture"}),
        ("qwen3_5", "hf-llama", {"qk_norm", "norm", "layer_types", "partial_rotary"}),
    ],
)
def test_what_the_target_cannot_compute_is_refused_by_name(
    tmp_path: Path, model_type: str, to: str, names: set[str]
) -> None:
    source = save_hf(small(model_type), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for label, v in raised.value.facts if label == "refused"}
    assert refused == names
