"""torchtitan's own gpt-oss: the logits of the Hugging Face model, published in bf16 or in MXFP4."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import CoverageError, NotExpressibleError
from support.checkpoints import gpt_oss as published
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.models.hf_models import save_hf, tiny
from support.models.layers import random_tokens, randomise
from support.models.titan_package import Attend, built, on_a_cpu, without_bf16
from support.versions import load_alone

pytest.importorskip("torchtitan", reason="needs .[interop]")

TITAN = "torchtitan-gpt_oss"


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu(monkeypatch)
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    forward = GptOssGroupedExperts.forward
    monkeypatch.setattr(GptOssGroupedExperts, "forward", without_bf16(forward))


PLAIN = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
YARN = {
    "rope_theta": 15e4,
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}

CASES = [
    pytest.param({}, id="usual"),
    pytest.param(PLAIN, id="plain-rope"),
    pytest.param({"rope_parameters": {**YARN, "truncate": True}}, id="yarn-whole-numbers"),
    pytest.param({"attention_bias": False}, id="no-attention-biases"),
    pytest.param({"num_hidden_layers": 11, "layer_types": None}, id="eleven-layers"),
    pytest.param({"num_local_experts": 11, "num_experts_per_tok": 3}, id="eleven-experts"),
    pytest.param({"head_dim": 24, "num_key_value_heads": 6}, id="wide-heads"),
    pytest.param({"swiglu_limit": 0.5, "rms_norm_eps": 1e-6}, id="tight-limit"),
    pytest.param(
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        id="other-windows",
    ),
    pytest.param({"layer_types": ["full_attention"] * 3}, id="no-window"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
]


def titan(hf: Any, *, balances: bool = True) -> Any:
    """The model that torchtitan builds for these sizes, without weights."""
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.gpt_oss import (
        GptOssModel,
        _build_gptoss_layers,
        _make_gptoss_attn_config,
    )

    config = hf.config
    stated = config.rope_parameters
    yarn = (
        {
            "scaling": "yarn",
            "rope_factor": stated["factor"],
            "beta_fast": stated["beta_fast"],
            "beta_slow": stated["beta_slow"],
            "truncate": stated["truncate"],
            "original_seq_len": stated["original_max_position_embeddings"],
        }
        if stated["rope_type"] == "yarn"
        else {}
    )
    rope = CosSinRoPE.Config(
        dim=config.head_dim, max_seq_len=64, theta=stated["rope_theta"], **yarn
    )
    dim, vocab = config.hidden_size, config.vocab_size
    layers = _build_gptoss_layers(
        dim=dim,
        n_layers=config.num_hidden_layers,
        hidden_dim=config.intermediate_size,
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        load_balance_coeff=1e-3 if balances else None,
        moe_comm_backend="standard",
        rope=rope,
    )
    windows = [
        config.sliding_window if kind == "sliding_attention" else None
        for kind in config.layer_types
    ]
    for number, (layer, window) in enumerate(zip(layers, windows, strict=True)):
        layer.attention = _make_gptoss_attn_config(
            dim=dim,
            layer_id=number,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            sliding_window_size=window,
            rope=rope,
        )
        if not config.attention_bias:
            qkv = layer.attention.qkv_linear
            qkv.wqkv = dataclasses.replace(qkv.wqkv, bias=False)
            wo = layer.attention.wo
            layer.attention.wo = Linear.Config(
                in_features=wo.in_features, out_features=wo.out_features
            )
        experts = layer.moe.routed_experts.inner_experts
        experts.swiglu_limit = config.swiglu_limit
    model = built(
        GptOssModel.Config(
            vocab_size=vocab,
            dim=dim,
            tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim),
            norm=RMSNorm.Config(normalized_shape=dim),
            lm_head=Linear.Config(in_features=dim, out_features=vocab),
            layers=layers,
            enable_weight_tying=config.tie_word_embeddings,
        ),
        eps=config.rms_norm_eps,
    )
    for layer, window in zip(model.layers.values(), windows, strict=True):
        layer.attention.inner_attention = Attend(window)
    return model


@pytest.mark.parametrize("overrides", CASES)
def test_torchtitan_gives_the_logits_and_the_way_back_is_exact(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    hf = tiny("gpt_oss", **overrides)
    source = save_hf(hf, tmp_path / "hf")
    assert check(source, to=TITAN)
    report = convert(source, tmp_path / "titan.pth", to=TITAN)
    assert report.target.family == TITAN
    model = titan(hf)
    model.load_state_dict(torch_tensors(tmp_path / "titan.pth"))
    assert difference(model, hf) < RIGHT

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))

    convert(source, tmp_path / "dcp", to=TITAN)
    again = randomise(titan(hf), seed=3)
    state = again.state_dict()
    load_alone(state, checkpoint_id=tmp_path / "dcp")
    again.load_state_dict(state)
    assert difference(again, hf) < RIGHT


def test_its_own_adapter_agrees_where_it_knows_the_names(tmp_path: Path) -> None:
    """It calls experts as no parameter of the model is called any more."""
    from torchtitan.models.gpt_oss import GptOssStateDictAdapter

    hf = tiny("gpt_oss")
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "titan.pth", to=TITAN)
    found = torch_tensors(tmp_path / "titan.pth")
    theirs = GptOssStateDictAdapter(titan(hf).config, None).from_hf(hf_tensors(source))
    known = theirs.keys() & found.keys()
    assert_same({key: found[key] for key in known}, {key: theirs[key] for key in known})
    assert all(".inner_experts." in key for key in theirs.keys() - known)
    assert {key.rpartition(".")[2] for key in found.keys() - known} == {
        *("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED", "expert_bias_E")
    }


def test_experts_in_mxfp4_become_what_torchtitan_trains(tmp_path: Path) -> None:
    """torchtitan's own reader gives experts as MXFP4 stores them: a row per output."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source, worth = published.published(tmp_path / "in")
    convert(source, tmp_path / "titan.pth", to=TITAN, dequantize=True)
    found = torch_tensors(tmp_path / "titan.pth")
    stored = hf_tensors(source)
    inner = "moe.routed_experts.inner_experts"
    for name, key in (("gate_up_proj", "mlp1_weight_EGD"), ("down_proj", "mlp2_weight_EDF")):
        parts = (
            stored[f"model.layers.1.mlp.experts.{name}_{part}"] for part in ("blocks", "scales")
        )
        right = convert_moe_packed_tensors(*parts).mT
        assert torch.equal(found[f"layers.1.{inner}.{key}"], right)

    hf = published.model()
    hf.load_state_dict(worth)
    model = titan(hf)
    model.load_state_dict(found)
    tokens = random_tokens(hf.config.vocab_size)
    with torch.no_grad():
        assert (model.float()(tokens) - hf.float()(tokens).logits).abs().max() < RIGHT

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source, dequantize=True)
    assert_same(hf_tensors(tmp_path / "back"), worth)


def test_a_live_model_is_loaded_both_ways(tmp_path: Path) -> None:
    hf = tiny("gpt_oss")
    source = save_hf(hf, tmp_path / "hf")
    model = randomise(titan(hf), seed=7)
    load_init_weights(model, source)
    assert difference(model, hf) < RIGHT
    assert check(source, against=model)

    torch.save(model.state_dict(), tmp_path / "titan.pth")
    other = tiny("gpt_oss", seed=3)
    load_init_weights(other, tmp_path / "titan.pth", assets=source)
    assert difference(other, hf) < RIGHT


def test_a_model_trained_in_torchtitan_becomes_an_hf_model_with_its_logits(tmp_path: Path) -> None:
    twin = tiny("gpt_oss")
    assets = save_hf(twin, tmp_path / "assets")
    model = randomise(titan(twin, balances=False), seed=5)
    torch.save(model.state_dict(), tmp_path / "titan.pth")
    convert(tmp_path / "titan.pth", tmp_path / "hf", form="hf", assets=assets)
    assert difference(load_hf(tmp_path / "hf"), model) < RIGHT


def test_a_bias_that_chooses_experts_is_lost_only_on_request(tmp_path: Path) -> None:
    twin = tiny("gpt_oss")
    assets = save_hf(twin, tmp_path / "assets")
    torch.save(randomise(titan(twin), seed=5).state_dict(), tmp_path / "titan.pth")
    with pytest.raises(CoverageError, match="--allow selection_bias"):
        convert(tmp_path / "titan.pth", tmp_path / "hf", form="hf", assets=assets)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        pytest.param({"swiglu_alpha": 1.5}, {"clamped_glu"}, id="other-alpha"),
        pytest.param(
            {"rope_parameters": {**YARN, "attention_factor": 1.5}}, {"rope_scaling"}, id="factor"
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
    source = save_hf(tiny("gpt_oss", **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=TITAN)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused == names
    assert {fault.key for fault in check(source, to=TITAN).refused} == names


@pytest.mark.parametrize("to", ["lingua", "hf-llama", "hf-qwen3_moe", "torchtitan-qwen3"])
def test_no_other_naming_computes_it(tmp_path: Path, to: str) -> None:
    source = save_hf(tiny("gpt_oss"), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused >= {"sinks", "clamped_glu", "expert_bias"}


def test_published_fields_are_understood(tmp_path: Path) -> None:
    """The released config.json names some numbers twice, in OpenAI's own words."""
    source = save_hf(tiny("gpt_oss"), tmp_path / "hf")
    fields = json.loads((source / "config.json").read_text())
    fields |= {"experts_per_token": 2, "initial_context_length": 4096}
    (source / "config.json").write_text(json.dumps(fields))
    assert check(source, to=TITAN)
