"""What classes with experts compute otherwise is refused; what their files say is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from dcpconv.families.configs import read_spec
from support.checkpoints.families import load_hf, logits
from support.models.hf_models import save_hf, tiny

REFUSED = [
    pytest.param(
        "qwen2_moe",
        {},
        "hf-qwen3_moe",
        {"experts", "qk_norm", "qkv_bias"},
        1,
        id="gate-on-shared",
    ),
    pytest.param("qwen3_moe", {}, "hf-qwen2_moe", {"experts", "qk_norm"}, 1, id="no-gate-there"),
    pytest.param("olmoe", {}, "hf-qwen3_moe", {"qk_norm", "qk_norm_whole"}, 0, id="whole-norms"),
    pytest.param(
        "flex_olmo", {}, "hf-olmoe", {"no_pre_norms", "post_norms"}, 0, id="norms-behind-blocks"
    ),
    pytest.param(
        "dots1",
        {"routed_scaling_factor": 2.5},
        "hf-qwen3_moe",
        {"experts"},
        # Scores, groups, the factor, the bias and the shared expert.
        5,
        id="another-router",
    ),
    pytest.param(
        "dots1", {"first_k_dense_replace": 1}, "hf-solar_open", {"experts", "qk_norm"}, 1,
        id="dense-layers",
    ),
    pytest.param("dots1", {"attention_bias": True}, "hf-glm4_moe", {"o_bias"}, 0, id="o-bias"),
    pytest.param(
        "dots1",
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8,
         "num_hidden_layers": 4},
        "hf-glm4_moe",
        {"sliding_window", "layer_types"},
        0,
        id="windows",
    ),
    pytest.param("glm4_moe", {}, "hf-dots1", {"partial_rotary"}, 0, id="half-of-each-head"),
    pytest.param(
        "exaone_moe",
        {},
        "hf-dots1",
        {"no_rope_layers"},
        0,
        id="layers-without-rope",
    ),
    pytest.param(
        "minimax_m2",
        {},
        "hf-mixtral",
        {"experts", "partial_rotary", "qk_norm_whole"},
        2,
        id="minimax-whole-norms",
    ),
    pytest.param("deepseek_v2", {}, "hf-deepseek_v3", {"experts"}, 1, id="softmax-scores"),
    pytest.param(
        "deepseek_v2", {"mlp_bias": True}, "hf-glm4_moe_lite", {"experts", "mlp_bias"}, 1, id="bias"
    ),
    pytest.param(
        "glm4_moe_lite",
        {"mlp_layer_types": ["sparse", "dense", "sparse"]},
        "hf-deepseek_v3",
        {"experts"},
        1,
        id="a-dense-layer-in-the-middle",
    ),
    pytest.param("hy_v3", {"mlp_bias": True}, "hf-dots1", {"mlp_bias"}, 0, id="hy_v3-mlp-bias"),
    # What no other class computes.
    pytest.param(
        "deepseek_v32", {}, "hf-deepseek_v3", {"indexer"}, 0, id="deepseek_v32-indexer"
    ),
    pytest.param(
        "glm_moe_dsa", {}, "hf-glm4_moe_lite", {"indexer"}, 0, id="glm_moe_dsa-indexer"
    ),
    pytest.param(
        "afmoe",
        {"mup_enabled": True},
        "hf-dots1",
        {"attention_gate", "embedding_multiplier", "no_rope_layers", "post_norms"},
        0,
        id="afmoe",
    ),
    pytest.param(
        "llama4_text",
        {},
        "hf-qwen3_moe",
        {
            *("chunked_attention", "layer_types", "no_rope_layers", "qk_norm_plain"),
            *("scaled_inputs", "temperature", "experts", "qk_norm"),
        },
        2,
        id="llama4_text",
    ),
    pytest.param(
        "hunyuan_v1_moe", {}, "hf-qwen3_moe", {"experts", "qk_norm", "qk_norm_late"}, 1,
        id="hunyuan_v1_moe",
    ),
    pytest.param(
        "phimoe", {}, "hf-mixtral", {"experts", "norm", "norm_bias", "sparse_mixer"}, 1, id="phimoe"
    ),
    pytest.param("deepseek_v3", {}, "hf-deepseek_v32", {"architecture"}, 0, id="another-model"),
    pytest.param(
        "granitemoe",
        {"attention_multiplier": 0.5, "logits_scaling": 2.0},
        "hf-mixtral",
        {"query_multiplier", "logits_scaling"},
        0,
        id="multipliers",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "overrides", "to", "names", "reasons"), REFUSED)
def test_what_another_class_computes_otherwise_is_refused_with_every_reason(
    tmp_path: Path,
    model_type: str,
    overrides: dict[str, Any],
    to: str,
    names: set[str],
    reasons: int,
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", form="hf", to=to)
    told = [str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"]
    assert set(told) == names
    assert told.count("experts") == reasons
    assert {fault.key for fault in check(source, to=to).refused} == names
    assert not (tmp_path / "out").exists()


UNHEEDED = [
    pytest.param("deepseek_v2", "norm_topk_prob", True, id="normalised-by-its-own-code"),
    pytest.param("deepseek_v2", "scoring_func", "sigmoid", id="scores"),
    pytest.param("glm4_moe_lite", "first_k_dense_replace", 3, id="dense-layers-by-number"),
    pytest.param("hy_v3", "n_group", 2, id="groups"),
    pytest.param("olmoe", "clip_qkv", 8.0, id="clipped"),
    pytest.param("minimax_m2", "attn_type_list", [1, 0, 1], id="linear-layers"),
    pytest.param("minimax_m2", "shared_intermediate_size", 52, id="shared-experts"),
    pytest.param("dots1", "mlp_layer_types", ["sparse"] * 3, id="kinds-of-another-class"),
]


@pytest.mark.parametrize(("model_type", "field", "value"), UNHEEDED)
def test_a_field_that_the_class_does_not_look_at_has_to_say_what_it_does(
    tmp_path: Path, model_type: str, field: str, value: object
) -> None:
    source = save_hf(tiny(model_type), tmp_path / "hf")
    assert read_spec(source).unaccounted == ()
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    (told,) = read_spec(source).unaccounted
    assert told == f"{field}: {value!r}"
    convert(source, tmp_path / "live.pth", to="hf-memory")  # the same class: nothing is lost


def test_a_rope_per_kind_of_layer_is_carried_and_refused_elsewhere(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    model = tiny("mellum", layer_types=kinds, sliding_window=64, rope_parameters=ropes)
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="hf-memory")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf")
    assert torch.equal(logits(load_hf(tmp_path / "back")), logits(load_hf(source)))
    with pytest.raises(NotExpressibleError, match=r"rope_parameters: another one"):
        convert(source, tmp_path / "out", form="hf", to="hf-qwen3_moe")
