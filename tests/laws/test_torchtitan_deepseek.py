"""torchtitan's own DeepSeek-V3: the logits of the Hugging Face model, the bytes of its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    torch_tensors,
)
from support.models.hf_models import save_hf, tiny
from support.models.titan_package import built, on_a_cpu

pytest.importorskip("torchtitan", reason="needs .[interop]")


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu(monkeypatch)


YARN = {
    "rope_theta": 1e4,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

CASES = [
    pytest.param({}, id="latent-queries"),
    pytest.param({"q_lora_rank": None}, id="direct-queries"),
    pytest.param({"num_hidden_layers": 11, "first_k_dense_replace": 2}, id="eleven-layers"),
    pytest.param({"n_routed_experts": 12, "n_group": 4, "topk_group": 2}, id="twelve-experts"),
    pytest.param({"n_group": 1, "n_shared_experts": 2}, id="no-groups-two-shared"),
    pytest.param({"first_k_dense_replace": 0, "norm_topk_prob": False}, id="all-sparse-as-scored"),
    pytest.param({"first_k_dense_replace": 3}, id="all-dense"),
    pytest.param({"routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6}, id="unscaled"),
    pytest.param({"rope_parameters": YARN}, id="yarn"),
    pytest.param(
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}, id="yarn-other-scale"
    ),
]


def _dense(config: Any) -> int:
    """How many layers have no experts, the first ones."""
    kinds = getattr(config, "mlp_layer_types", None)
    return int(config.first_k_dense_replace if kinds is None else kinds.count("dense"))


def titan_config(hf: Any) -> Any:
    """What torchtitan's config says of the same model."""
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.deepseek_v3 import DeepSeekV3Model, _build_dsv3_layers

    config = hf.config
    rope = config.rope_parameters
    scaling = (
        {
            "scaling": "yarn",
            "rope_factor": rope["factor"],
            "beta_fast": rope["beta_fast"],
            "beta_slow": rope["beta_slow"],
            "original_seq_len": rope["original_max_position_embeddings"],
        }
        if rope["rope_type"] == "yarn"
        else {}
    )
    layers = _build_dsv3_layers(
        n_layers=config.num_hidden_layers,
        n_dense_layers=_dense(config),
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank or 0,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        mscale=rope.get("mscale_all_dim", 1.0),
        dense_hidden_dim=config.intermediate_size,
        moe_hidden_dim=config.moe_intermediate_size,
        num_experts=config.n_routed_experts,
        num_shared_experts=config.n_shared_experts,
        router_top_k=config.num_experts_per_tok,
        router_score_func="softmax" if config.model_type == "deepseek_v2" else "sigmoid",
        router_num_expert_groups=config.n_group if (config.n_group or 1) > 1 else None,
        router_num_limited_groups=config.topk_group if (config.n_group or 1) > 1 else None,
        router_route_scale=config.routed_scaling_factor,
        router_route_norm=config.norm_topk_prob,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(
            dim=config.qk_rope_head_dim, max_seq_len=64, theta=rope["rope_theta"], **scaling
        ),
    )
    dim, vocab = config.hidden_size, config.vocab_size
    return DeepSeekV3Model.Config(
        vocab_size=vocab,
        dim=dim,
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim),
        norm=RMSNorm.Config(normalized_shape=dim),
        lm_head=Linear.Config(in_features=dim, out_features=vocab),
        layers=layers,
        mtp_layers=[],
    )


def titan(hf: Any) -> Any:
    """The model that torchtitan builds, without weights."""
    model = built(titan_config(hf), eps=hf.config.rms_norm_eps)
    for layer in model.layers.values():
        # Between latent ranks transformers has an eps of its own.
        layer.attention.kv_norm.eps = 1e-6
        if hasattr(layer.attention, "q_norm"):
            layer.attention.q_norm.eps = 1e-6
    return model


@pytest.mark.parametrize("overrides", CASES)
def test_torchtitan_gives_the_logits_and_its_adapter_the_bytes(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    from torchtitan.models.deepseek_v3 import DeepSeekV3StateDictAdapter

    hf = tiny("deepseek_v3", **overrides)
    source = save_hf(hf, tmp_path / "hf")
    report = convert(source, tmp_path / "titan.pth", to="torchtitan-deepseek_v3")
    assert report.target.family == "torchtitan-deepseek_v3"
    found = torch_tensors(tmp_path / "titan.pth")

    model = titan(hf)
    model.load_state_dict(found)
    assert difference(model, hf) < RIGHT

    if hf.config.first_k_dense_replace < hf.config.num_hidden_layers:
        adapter = DeepSeekV3StateDictAdapter(titan_config(hf), None)
        theirs = adapter.from_hf(hf_tensors(source))
        assert_same(found, theirs)
        assert_same(hf_tensors(source), adapter.to_hf(found))

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        pytest.param("deepseek_v2", {}, id="deepseek_v2"),
        pytest.param("deepseek_v2", {"q_lora_rank": None}, id="deepseek_v2-direct"),
        pytest.param("deepseek_v2", {"rope_parameters": YARN}, id="deepseek_v2-yarn"),
        pytest.param(
            "deepseek_v2",
            {"num_hidden_layers": 11, "n_routed_experts": 12, "n_shared_experts": 2},
            id="deepseek_v2-eleven-layers-twelve-experts",
        ),
        pytest.param("glm4_moe_lite", {}, id="glm4_moe_lite"),
        pytest.param(
            "glm4_moe_lite", {"norm_topk_prob": False, "n_group": 1}, id="glm4_moe_lite-as-scored"
        ),
    ],
)
def test_torchtitan_computes_what_the_classes_around_deepseek_v3_do(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    hf = tiny(model_type, **overrides)
    source = save_hf(hf, tmp_path / "hf")
    assert check(source, to="torchtitan-deepseek_v3")
    convert(source, tmp_path / "titan.pth", to="torchtitan-deepseek_v3")
    model = titan(hf)
    model.load_state_dict(torch_tensors(tmp_path / "titan.pth"))
    assert difference(model, hf) < RIGHT

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        pytest.param(
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
            "2 groups",
            id="groups-by-their-best",
        ),
        pytest.param(
            "glm4_moe_lite",
            {"mlp_layer_types": ["sparse", "dense", "sparse"]},
            "dense layers 1",
            id="a-dense-layer-between",
        ),
    ],
)
def test_experts_that_torchtitan_does_not_have_are_refused(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], reason: str
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError, match=f"experts: {reason}"):
        convert(source, tmp_path / "out", to="torchtitan-deepseek_v3")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        pytest.param({"attention_bias": True}, {"latent_bias", "o_bias"}, id="biases"),
        pytest.param({"tie_word_embeddings": True}, {"tied"}, id="tied"),
        pytest.param({"hidden_act": "gelu"}, {"activation"}, id="activation"),
        pytest.param(
            {"rope_parameters": {**YARN, "mscale_all_dim": 0.5}}, {"rope_scaling"}, id="two-scales"
        ),
        pytest.param(
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            {"rope_scaling"},
            id="linear",
        ),
    ],
)
def test_what_torchtitan_cannot_compute_is_refused_by_name(
    tmp_path: Path, overrides: dict[str, Any], names: set[str]
) -> None:
    source = save_hf(tiny("deepseek_v3", **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to="torchtitan-deepseek_v3")
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused == names
    assert {fault.key for fault in check(source, to="torchtitan-deepseek_v3").refused} == names
