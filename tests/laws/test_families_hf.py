"""Hugging Face classes: names on disk and in memory, and a config.json that rebuilds the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dcpconv import convert
from dcpconv.core.errors import NotExpressibleError, SpecError
from dcpconv.families.configs import read_spec, refusals, to_text, write_config
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    logits,
    torch_tensors,
)
from support.models.hf_models import MODEL_TYPES, save_hf, tiny
from support.models.mixture_cases import MIXTURE_CASES

SLIDING = {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2}
TEMPERATURE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "llama_4_scaling_beta": 0.3,
    "original_max_position_embeddings": 8,
}
"""Grows already within the tokens of ``difference``."""

CASES = [
    *(pytest.param(name, {}, id=name) for name in MODEL_TYPES),
    pytest.param("qwen2", {"tie_word_embeddings": True}, id="qwen2-tied"),
    pytest.param("qwen2", {"num_hidden_layers": 11}, id="qwen2-eleven-layers"),
    pytest.param("qwen3", {"attention_bias": True, "head_dim": 24}, id="qwen3-biased-wide-heads"),
    pytest.param("qwen3_moe", {"num_experts": 11, "mlp_only_layers": [0]}, id="eleven-experts"),
    pytest.param("qwen3_moe", {"tie_word_embeddings": True}, id="qwen3_moe-tied"),
    pytest.param("phi3", {"partial_rotary_factor": 0.5}, id="phi3-partial-rotary"),
    pytest.param("glm", {"attention_bias": False, "num_key_value_heads": 1}, id="glm-no-bias"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biased"),
    pytest.param("gemma2", {"attention_bias": True}, id="gemma2-biased"),
    pytest.param("olmo2", {"attention_bias": True}, id="olmo2-biased"),
    pytest.param("qwen3_moe", {"attention_bias": True}, id="qwen3_moe-biased"),
    pytest.param("qwen3_moe", {"decoder_sparse_step": 2}, id="qwen3_moe-every-other-layer"),
    pytest.param(
        "granitemoeshared",
        {
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        id="granite-multipliers",
    ),
    pytest.param("granitemoeshared", {"shared_intermediate_size": 304}, id="granite-two-shared"),
    pytest.param("granitemoeshared", {"shared_intermediate_size": 0}, id="granite-none-shared"),
    pytest.param("deepseek_v3", {"q_lora_rank": None}, id="deepseek-direct-queries"),
    pytest.param("deepseek_v3", {"n_shared_experts": 2}, id="deepseek-two-shared"),
    pytest.param("deepseek_v3", {"n_shared_experts": 0}, id="deepseek-none-shared"),
    pytest.param("deepseek_v3", {"first_k_dense_replace": 0}, id="deepseek-all-sparse"),
    pytest.param("deepseek_v3", {"attention_bias": True}, id="deepseek-biased"),
    pytest.param(
        "deepseek_v3",
        {"attention_bias": True, "q_lora_rank": None},
        id="deepseek-biased-direct-queries",
    ),
    pytest.param("phi", {"qk_layernorm": True, "num_key_value_heads": 6}, id="phi-qk-norm"),
    pytest.param("phi", {"partial_rotary_factor": 1.0, "head_dim": 24}, id="phi-wide-heads"),
    pytest.param("starcoder2", {"use_bias": False, "sliding_window": 8}, id="starcoder2-window"),
    pytest.param("starcoder2", {"tie_word_embeddings": True}, id="starcoder2-tied"),
    pytest.param("gpt_neox", {"use_parallel_residual": False}, id="gpt_neox-in-turn"),
    pytest.param("gpt_neox", {"attention_bias": False, "rotary_pct": 1.0}, id="gpt_neox-no-bias"),
    pytest.param("gpt_neox", {"tie_word_embeddings": True}, id="gpt_neox-tied"),
    pytest.param("gpt2", {"n_inner": None, "num_hidden_layers": 11}, id="gpt2-eleven-layers"),
    pytest.param("gpt2", {"scale_attn_weights": False}, id="gpt2-unscaled"),
    pytest.param("gpt2", {"tie_word_embeddings": True}, id="gpt2-tied"),
    pytest.param("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}, id="stablelm-qk-norm"),
    pytest.param(
        "stablelm", {"use_parallel_residual": True, "tie_word_embeddings": True}, id="stablelm-tied"
    ),
    pytest.param("stablelm", {"partial_rotary_factor": 1.0}, id="stablelm-whole-heads"),
    pytest.param(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, id="falcon-groups"
    ),
    pytest.param(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
        id="falcon-groups-one-norm",
    ),
    pytest.param("falcon", {"multi_query": False, "bias": True}, id="falcon-multi-head-biased"),
    pytest.param("falcon", {"parallel_attn": False, "bias": True}, id="falcon-in-turn"),
    pytest.param(
        "falcon",
        {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        id="falcon-alibi",
    ),
    pytest.param(
        "falcon", {"tie_word_embeddings": True, "ffn_hidden_size": None}, id="falcon-tied"
    ),
    pytest.param("falcon", {"num_hidden_layers": 11}, id="falcon-eleven-layers"),
    pytest.param("bloom", {"tie_word_embeddings": True}, id="bloom-tied"),
    pytest.param("smollm3", {"no_rope_layers": [1, 0, 1]}, id="smollm3-nope"),
    pytest.param("smollm3", {"no_rope_layers": None, **SLIDING}, id="smollm3-windows"),
    pytest.param("smollm3", {"attention_bias": True, "mlp_bias": True}, id="smollm3-biased"),
    pytest.param("ernie4_5", {"use_bias": True}, id="ernie-dense-biased"),
    pytest.param("helium", {"attention_bias": True, "mlp_bias": True}, id="helium-biased"),
    pytest.param("internlm3", {"attention_bias": True, "mlp_bias": True}, id="internlm3-biased"),
    pytest.param("seed_oss", {"attention_bias": False}, id="seed_oss-without-biases"),
    pytest.param("seed_oss", {"attention_out_bias": True, "mlp_bias": True}, id="seed_oss-biased"),
    pytest.param("cwm", {"layer_types": None, "sliding_window": 8}, id="cwm-windows"),
    pytest.param("cwm", {"rope_parameters": None, "mlp_bias": True}, id="cwm-scaled-biased"),
    pytest.param("ministral3", {"rope_parameters": None}, id="ministral3-as-published"),
    pytest.param("ministral3", {"rope_parameters": TEMPERATURE}, id="ministral3-temperature"),
    pytest.param("arcee", {"attention_bias": True, "mlp_bias": True}, id="arcee-biased"),
    pytest.param("exaone4", {"layer_types": ["full_attention"] * 3}, id="exaone4-all-nope"),
    pytest.param(
        "exaone4",
        {"layer_types": ["full_attention"] * 3, "sliding_window": None},
        id="exaone4-no-window",
    ),
    pytest.param("glm4", {"attention_bias": False}, id="glm4-no-bias"),
    pytest.param("glm4", {"partial_rotary_factor": 1.0}, id="glm4-whole-heads"),
    pytest.param(
        "granite",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "attention_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        id="granite-dense-multipliers",
    ),
    pytest.param("cohere", {"use_qk_norm": True, "attention_bias": True}, id="cohere-qk-norm"),
    pytest.param("cohere", {"logit_scale": 0.5, "tie_word_embeddings": True}, id="cohere-tied"),
    pytest.param("gemma", {"attention_bias": True, "hidden_act": "gelu"}, id="gemma-biased"),
    pytest.param("ernie4_5_moe", {"use_bias": True}, id="ernie-biased"),
    pytest.param(
        "ernie4_5_moe", {"use_bias": True, "tie_word_embeddings": True}, id="ernie-biased-tied"
    ),
    pytest.param(
        "ernie4_5_moe", {"use_bias": True, "moe_num_shared_experts": 0}, id="ernie-biased-unshared"
    ),
    pytest.param("ernie4_5_moe", {"moe_layer_start_index": 0}, id="ernie-all-sparse"),
    pytest.param("ernie4_5_moe", {"moe_layer_start_index": 3}, id="ernie-all-dense"),
    pytest.param(
        "ernie4_5_moe",
        {"num_hidden_layers": 5, "moe_layer_interval": 2, "moe_layer_end_index": -1},
        id="ernie-every-other-layer",
    ),
    pytest.param(
        "ernie4_5_moe",
        {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
        id="ernie-dense-at-the-end",
    ),
    *MIXTURE_CASES,
]


@pytest.mark.parametrize(("model_type", "overrides"), CASES)
def test_live_names_and_disk_names_hold_the_same_tensors(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model = tiny(model_type, **overrides)
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "live.pth", to="hf-memory")
    assert_same(torch_tensors(tmp_path / "live.pth"), dict(model.state_dict()))

    convert(tmp_path / "live.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize(("model_type", "overrides"), CASES)
def test_the_config_we_write_makes_the_same_model(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model = tiny(model_type, **overrides)
    directory = save_hf(model, tmp_path / "hf")
    right = logits(load_hf(directory))  # from the same place in memory as below, to the last bit
    spec = read_spec(directory)
    assert refusals(f"hf-{model_type}", spec) == ()
    # Without what is merely carried over, so that nothing of the old file can help.
    bare = spec.model_copy(update={"extra": {}})
    (directory / "config.json").write_text(to_text(write_config(f"hf-{model_type}", bare)))
    assert torch.equal(logits(load_hf(directory)), right)
    assert read_spec(directory).model_copy(update={"extra": {}}) == bare


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoeshared", "deepseek_v3"])
def test_a_sharded_checkpoint_of_a_trainer_becomes_what_from_pretrained_reads(
    tmp_path: Path, model_type: str
) -> None:
    model = tiny(model_type, dtype=torch.bfloat16)
    source = save_hf(model, tmp_path / "hf", max_shard_size="100KB")
    convert(source, tmp_path / "dcp", to="hf-memory", root="model", chunks=3)
    convert(tmp_path / "dcp", tmp_path / "back", to="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_a_live_state_dict_without_a_config_is_recognised_and_unstacked(tmp_path: Path) -> None:
    model = tiny("qwen3_moe", num_experts=11)
    torch.save(model.state_dict(), tmp_path / "live.pth")
    report = convert(tmp_path / "live.pth", tmp_path / "hf", form="hf", to="hf-qwen3_moe")
    assert report.source.family == "hf-memory-qwen3_moe"
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(save_hf(model, tmp_path / "expected")))


def test_phi3_becomes_llama_once_its_matrices_are_cut(tmp_path: Path) -> None:
    model = tiny("phi3")
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "llama", form="hf", to="hf-llama")
    assert difference(load_hf(tmp_path / "llama"), model) < RIGHT
    convert(tmp_path / "llama", tmp_path / "back", form="hf", to="hf-phi3")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert difference(load_hf(tmp_path / "back"), model) == 0.0


def test_ernie_without_experts_is_a_llama_with_biases(tmp_path: Path) -> None:
    """The one way out of ERNIE: its biases turn in pairs, as its weights do."""
    model = tiny("ernie4_5_moe", use_bias=True, moe_layer_start_index=3)
    with torch.no_grad():
        model.lm_head.bias.zero_()
    source = save_hf(model, tmp_path / "hf")
    tensors = hf_tensors(source)
    del tensors["lm_head.bias"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    allow = ["experts", "head_bias"]
    convert(source, tmp_path / "llama", form="hf", to="hf-llama", allow=allow)
    assert difference(load_hf(tmp_path / "llama"), model) < RIGHT


EXPERTS = "top_k=2,experts.norm_topk=true"


@pytest.mark.parametrize(
    ("model_type", "overrides", "more"),
    [
        pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, [], id="llama-biased"),
        pytest.param("olmo2", {"attention_bias": True}, [], id="olmo2-biased"),
        pytest.param("ernie4_5_moe", {"use_bias": True}, ["top_k=2,theta=5e5"], id="ernie-biased"),
        pytest.param("qwen3_moe", {"mlp_only_layers": [1]}, [EXPERTS], id="some-dense"),
    ],
)
def test_biases_and_dense_layers_are_found_where_no_config_tells_of_them(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], more: list[str]
) -> None:
    model = tiny(model_type, tie_word_embeddings=False, **overrides)
    torch.save(model.state_dict(), tmp_path / "live.pth")
    convert(
        tmp_path / "live.pth",
        tmp_path / "hf",
        form="hf",
        to=f"hf-{model_type}",
        spec=["heads=6,kv_heads=2,eps=1e-5,theta=1e4", *more],
    )
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(save_hf(model, tmp_path / "expected")))
    assert difference(load_hf(tmp_path / "hf"), model) < RIGHT


@pytest.mark.parametrize(
    ("model_type", "lacks"),
    [
        pytest.param("llama", {"norm_eps", "rope_theta"}, id="llama"),
        pytest.param(
            "qwen3_moe",
            {"norm_eps", "rope_theta", "per_token", "experts.norm_topk"},
            id="qwen3_moe",
        ),
        pytest.param(
            "gemma2",
            {
                *("norm_eps", "rope_theta", "layer_types", "embedding_multiplier"),
                *("attn_logit_softcap", "final_logit_softcap", "query_multiplier"),
            },
            id="gemma2",
        ),
        pytest.param("glm", {"norm_eps", "rope_theta", "partial_rotary_factor"}, id="glm"),
    ],
)
def test_no_config_is_written_from_a_guess(
    tmp_path: Path, model_type: str, lacks: set[str]
) -> None:
    torch.save(tiny(model_type).state_dict(), tmp_path / "live.pth")
    with pytest.raises(SpecError, match="no file says") as raised:
        convert(
            tmp_path / "live.pth",
            tmp_path / "hf",
            form="hf",
            to=f"hf-{model_type}",
            spec="heads=6,kv_heads=2",
        )
    assert {value for label, value in raised.value.facts if label == "lacks"} == lacks
    assert not (tmp_path / "hf").exists()


REFUSED = [
    pytest.param("qwen2", {}, "hf-llama", {"qkv_bias"}, id="bias"),
    pytest.param("qwen3", {}, "lingua", {"qk_norm"}, id="qk-norm"),
    pytest.param("glm", {}, "hf-llama", {"partial_rotary", "qkv_bias"}, id="partial-rotary"),
    pytest.param("olmo2", {}, "meta", {"no_pre_norms", "post_norms", "qk_norm_whole"}, id="norms"),
    pytest.param("llama", {}, "hf-qwen3", {"qk_norm"}, id="norms-that-are-not-there"),
    pytest.param("mixtral", {}, "torchtitan-llama3", {"experts"}, id="experts"),
    pytest.param(
        "deepseek_v3", {}, "hf-qwen3_moe", {"experts", "latent_attention", "qk_norm"}, id="mla"
    ),
    pytest.param(
        "gemma2",
        {},
        "lingua",
        {
            "activation",
            "attn_softcap",
            "embedding_multiplier",
            "final_softcap",
            "layer_types",
            "norm",
            "post_norms",
            "sliding_window",
        },
        id="gemma",
    ),
    pytest.param(
        "qwen3_moe", {"norm_topk_prob": False}, "hf-mixtral", {"qk_norm", "experts"}, id="top-k"
    ),
    *(
        pytest.param(
            "ernie4_5_moe",
            {"use_bias": True},
            to,
            {"qkv_bias", "o_bias", "mlp_bias", "head_bias", "experts", *more} - able,
            id=f"ernie-biases-{to}",
        )
        for to, more, able in (
            ("lingua", set(), set()),
            ("meta", set(), set()),
            ("minimind3", {"untied"}, set()),
            ("torchtitan-qwen3", {"qk_norm"}, set()),
            ("hf-llama", set(), {"qkv_bias", "o_bias", "mlp_bias"}),
            ("hf-qwen3_moe", {"qk_norm"}, {"qkv_bias", "o_bias"}),
            ("hf-granitemoeshared", set(), {"qkv_bias", "o_bias"}),
        )
    ),
    pytest.param(
        "granitemoeshared",
        {"attention_bias": True, "shared_intermediate_size": 0},
        "hf-ernie4_5_moe",
        {"qkv_bias", "o_bias"},
        id="a-switch-for-more-biases",
    ),
    pytest.param(
        "deepseek_v3",
        {"attention_bias": True},
        "hf-llama",
        {"o_bias", "experts", "latent_attention", "latent_bias"},
        id="latent-biases",
    ),
    pytest.param(
        "llama",
        {"attention_bias": True},
        "hf-deepseek_v3",
        {"o_bias", "qkv_bias", "experts", "latent_attention"},
        id="biases-of-another-kind",
    ),
    pytest.param(
        "gemma2",
        {"attention_bias": True},
        "hf-llama",
        {
            "attn_softcap",
            "embedding_multiplier",
            "final_softcap",
            "layer_types",
            "norm",
            "post_norms",
            "sliding_window",
        },
        id="gemma-biases",
    ),
]


@pytest.mark.parametrize(("model_type", "overrides", "to", "names"), REFUSED)
def test_what_a_family_cannot_hold_is_refused_with_every_reason(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], to: str, names: set[str]
) -> None:
    source = save_hf(tiny(model_type, **overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused == names
    assert not (tmp_path / "out").exists()
