"""Classes from before Llama: those that compute the same become each other, others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
)
from support.models.hf_models import save_hf, tiny

IN_TURN = {
    "use_parallel_residual": False,
    "num_key_value_heads": 6,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0},
}
"""A GPT-NeoX whose blocks come one after the other and whose heads turn whole."""

SAME = [
    pytest.param("gpt_neox", IN_TURN, "hf-starcoder2", id="gpt_neox-starcoder2"),
    pytest.param("gpt_neox", {**IN_TURN, "tie_word_embeddings": True}, "hf-starcoder2", id="tied"),
    pytest.param(
        "gpt_neox", {**IN_TURN, "num_hidden_layers": 11}, "hf-starcoder2", id="eleven-layers"
    ),
    pytest.param(
        "starcoder2",
        {"num_key_value_heads": 6, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        "hf-gpt_neox",
        id="starcoder2-gpt_neox",
    ),
]


@pytest.mark.parametrize(("model_type", "overrides", "to"), SAME)
def test_the_other_class_gives_the_same_logits_and_the_way_back_is_exact(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], to: str
) -> None:
    model = tiny(model_type, **overrides)
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to=to)
    convert(source, tmp_path / "other", form="hf", to=to)
    fields = json.loads((tmp_path / "other/config.json").read_text())
    assert f"hf-{fields['model_type']}" == to
    assert difference(load_hf(tmp_path / "other"), model) < RIGHT

    convert(tmp_path / "other", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), model) == 0.0


ALL_HEADS = {"multi_query": False, "bias": True}
BESIDE = {"new_decoder_architecture": True, "num_kv_heads": 6, "bias": True}
SAME += [
    pytest.param(
        "falcon", {**ALL_HEADS, "parallel_attn": False}, "hf-gpt_neox", id="falcon-gpt_neox"
    ),
    pytest.param(
        "falcon", {**ALL_HEADS, "parallel_attn": False}, "hf-starcoder2", id="falcon-starcoder2"
    ),
    pytest.param(
        "falcon",
        {"multi_query": True, "bias": True, "parallel_attn": False},
        "hf-starcoder2",
        id="falcon-starcoder2-one-kv-head",
    ),
    pytest.param("falcon", BESIDE, "hf-gpt_neox", id="falcon-gpt_neox-beside"),
    pytest.param(
        "gpt_neox",
        {**IN_TURN, "use_parallel_residual": True},
        "hf-falcon",
        id="gpt_neox-falcon-beside",
    ),
    pytest.param("gpt_neox", IN_TURN, "hf-falcon", id="gpt_neox-falcon"),
    pytest.param("starcoder2", {"num_key_value_heads": 1}, "hf-falcon", id="starcoder2-falcon"),
    pytest.param(
        "starcoder2",
        {"num_key_value_heads": 1, "use_bias": False},
        "hf-falcon",
        id="starcoder2-falcon-no-bias",
    ),
]

NORMS = {"norm", "norm_bias"}
BIASES = {"qkv_bias", "o_bias", "mlp_bias"}
UNGATED = {"ungated", "activation"}

REFUSED = [
    pytest.param(
        "phi",
        {},
        NORMS | BIASES | UNGATED | {"head_bias", "parallel_residual", "partial_rotary"},
        id="phi",
    ),
    pytest.param("phi", {"qk_layernorm": True}, {"qk_norm"}, id="phi-qk-norm"),
    pytest.param("starcoder2", {}, NORMS | BIASES | UNGATED, id="starcoder2"),
    pytest.param("starcoder2", {"sliding_window": 8}, {"sliding_window"}, id="starcoder2-window"),
    pytest.param(
        "gpt_neox",
        {},
        NORMS | BIASES | UNGATED | {"parallel_residual", "parallel_norms", "partial_rotary"},
        id="gpt_neox",
    ),
    pytest.param("stablelm", {}, NORMS | {"partial_rotary"}, id="stablelm"),
    pytest.param(
        "stablelm",
        {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
        {"qk_norm_heads", "parallel_residual"},
        id="stablelm-switches",
    ),
    pytest.param("falcon", {}, NORMS | UNGATED | {"parallel_residual"}, id="falcon"),
    pytest.param("falcon", {"alibi": True}, {"positions"}, id="falcon-alibi"),
    pytest.param("gpt2", {}, NORMS | BIASES | UNGATED | {"positions"}, id="gpt2"),
    pytest.param(
        "gpt2",
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"query_multiplier", "config.scale_attn_by_inverse_layer_idx"},
        id="gpt2-scales",
    ),
    pytest.param("bloom", {}, NORMS | BIASES | UNGATED | {"positions", "embed_norm"}, id="bloom"),
    pytest.param(
        "bloom",
        {"apply_residual_connection_post_layernorm": True},
        {"config.apply_residual_connection_post_layernorm"},
        id="bloom-residual",
    ),
]


@pytest.mark.parametrize("to", ["lingua", "meta", "torchtitan-llama3", "hf-llama"])
@pytest.mark.parametrize(("model_type", "overrides", "names"), REFUSED)
def test_what_a_llama_cannot_compute_is_refused_by_name(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], names: set[str], to: str
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    if to == "hf-llama":
        names = names - BIASES - {"activation"}
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused >= names | NORMS
    if not overrides:
        assert refused == names
    assert {fault.key for fault in check(source, to=to).refused} == refused
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "overrides", "to", "names"),
    [
        pytest.param(
            "starcoder2", {"sliding_window": 8}, "hf-gpt_neox", {"n_kv_heads", "sliding_window"}
        ),
        pytest.param(
            "gpt_neox",
            {},
            "hf-starcoder2",
            {"partial_rotary", "parallel_residual", "parallel_norms"},
        ),
        pytest.param("phi", {}, "hf-gpt_neox", {"head_bias", "n_kv_heads", "parallel_residual"}),
        pytest.param("starcoder2", {}, "hf-falcon", {"n_kv_heads"}),
        pytest.param("falcon", {}, "hf-gpt_neox", {"n_kv_heads", "parallel_residual", "mlp_bias"}),
        pytest.param(
            "falcon", {"alibi": True}, "hf-starcoder2", {"positions", "parallel_residual"}
        ),
        pytest.param("stablelm", {}, "hf-starcoder2", {"partial_rotary", "ungated"}),
        pytest.param("gpt2", {}, "hf-bloom", {"embed_norm", "ffn_size"}),
        pytest.param("bloom", {}, "hf-gpt2", {"embed_norm"}),
        pytest.param("bloom", {}, "hf-gpt_neox", {"positions", "embed_norm"}),
        pytest.param("llama", {}, "hf-starcoder2", {"norm", "norm_bias", "ungated"}),
    ],
)
def test_what_another_of_them_cannot_compute_is_refused_by_name(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], to: str, names: set[str]
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", form="hf", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused >= names


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_masks_that_older_files_store_are_dropped(tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type)
    source = save_hf(model, tmp_path / "hf")
    right = hf_tensors(source)
    attention = {"gpt2": "transformer.h.{}.attn", "gpt_neox": "gpt_neox.layers.{}.attention"}
    masks = {
        f"{attention[model_type].format(layer)}.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)
        for layer in range(3)
    }
    file = source / "model.safetensors"
    save_file({**load_file(file), **masks}, file, metadata={"format": "pt"})
    report = convert(source, tmp_path / "out", form="hf", to=f"hf-{model_type}")
    assert {key for key, _ in report.ignored} == set(masks)
    assert_same(hf_tensors(tmp_path / "out"), right)


def test_published_files_of_bloom_spell_sizes_in_their_own_way(tmp_path: Path) -> None:
    source = save_hf(tiny("bloom"), tmp_path / "hf")
    fields = json.loads((source / "config.json").read_text())
    fields["n_embed"] = fields.pop("hidden_size")
    fields["num_attention_heads"] = fields.pop("n_head")
    fields |= {"seq_length": 64, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True}
    (source / "config.json").write_text(json.dumps(fields))
    assert check(source, to="hf-bloom")
    convert(source, tmp_path / "dcp", to="hf-memory")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
