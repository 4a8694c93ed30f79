"""Qwen3-Next and the language model of Qwen3.5-MoE: one computation, split otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dcpconv import check, convert, fingerprint, load_init_weights
from dcpconv.core.errors import NotExpressibleError
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import save_hf
from support.models.nested_models import small


def slow(model: Any) -> Any:
    """A model that forgets slowly, as trained ones do, and whose norms scale by about one: what
    random decays add up to lets rounding alone move the logits of one and the same class by 1e-3.
    """
    with torch.no_grad():
        for key, tensor in model.state_dict(keep_vars=True).items():
            if key.endswith("A_log"):
                tensor.sub_(4.0)
            elif key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
                tensor.sub_(1.0)
    return model


MANY: dict[str, Any] = {"num_hidden_layers": 11, "num_experts": 12, "layer_types": None}
CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"attention_bias": True}, id="biased"),
    pytest.param({**MANY, "full_attention_interval": 3, "head_dim": 24}, id="eleven-layers"),
    pytest.param({"linear_num_value_heads": 3}, id="one-value-head"),
    pytest.param({"layer_types": ["full_attention"] * 4}, id="all-full"),
    pytest.param({"hidden_act": "gelu", "rms_norm_eps": 1e-5}, id="gelu"),
    pytest.param(
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e5,
                "factor": 4.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 16,
            }
        },
        id="yarn",
    ),
]
BOTH = [
    pytest.param("qwen3_next", "qwen3_5_moe_text", id="next-to-3.5"),
    pytest.param("qwen3_5_moe_text", "qwen3_next", id="3.5-to-next"),
]


@pytest.mark.parametrize(("one", "other"), BOTH)
@pytest.mark.parametrize("overrides", CASES)
def test_the_other_class_computes_the_same_and_the_way_back_is_exact(
    tmp_path: Path, one: str, other: str, overrides: dict[str, Any]
) -> None:
    model = slow(small(one, **overrides))
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to=f"hf-{other}")
    convert(source, tmp_path / "other", form="hf", to=f"hf-{other}")
    there = load_hf(tmp_path / "other")
    assert there.config.model_type == other
    assert difference(there, model) < RIGHT
    assert fingerprint(tmp_path / "other").digest == fingerprint(source).digest

    # What that class holds in memory, straight from the files of this one.
    convert(source, tmp_path / "live.pth", to=f"hf-memory-{other}")
    assert_same(torch_tensors(tmp_path / "live.pth"), dict(there.state_dict()))
    fresh = small(other, **overrides, seed=1)
    load_init_weights(fresh, source, to=f"hf-memory-{other}")
    assert_same(dict(fresh.state_dict()), dict(there.state_dict()))

    convert(tmp_path / "other", tmp_path / "back", form="hf", to=f"hf-{one}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), model) < RIGHT


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        pytest.param(
            {"norm_topk_prob": False},
            "experts: weights do not sum to one: in Qwen3_5MoeForCausalLM they do",
            id="as-scored",
        ),
        pytest.param(
            {"mlp_only_layers": [1]},
            "experts: 1 dense layers: Qwen3_5MoeForCausalLM has experts in all",
            id="a-dense-layer",
        ),
        pytest.param(
            {"num_experts": 0},
            "architecture: qwen3_next: Qwen3_5MoeForCausalLM is another model",
            id="no-experts",
        ),
    ],
)
def test_what_qwen3_5_cannot_compute_is_refused_by_name(
    tmp_path: Path, overrides: dict[str, Any], reason: str
) -> None:
    source = save_hf(small("qwen3_next", **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", form="hf", to="hf-qwen3_5_moe_text")
    assert [str(v) for label, v in raised.value.facts if label == "refused"] == [reason]
    assert not (tmp_path / "out").exists()


def test_layers_that_predict_ahead_go_along(tmp_path: Path) -> None:
    source = save_hf(small("qwen3_next"), tmp_path / "hf")
    ahead = {"mtp.norm.weight": torch.ones(96)}
    save_file({**hf_tensors(source), **ahead}, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "other", form="hf", to="hf-qwen3_5_moe_text")
    assert "mtp.norm.weight" in hf_tensors(tmp_path / "other")
