"""Merging against the one who trained: what ``peft`` makes of the same model and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpconv import check, convert
from dcpconv.loading.init_weights import load_init_weights
from support.checkpoints.adapters import factors, merged, peft_tensors, save_peft
from support.checkpoints.families import assert_same, hf_tensors, torch_tensors
from support.models.hf_models import save_hf, tiny

peft = pytest.importorskip("peft", reason="needs .[interop]")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": PROJECTIONS,
    "mistral": PROJECTIONS,
    "qwen2": PROJECTIONS,
    "qwen3": PROJECTIONS,
    "olmo2": PROJECTIONS,
    "gemma2": PROJECTIONS,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "v_proj"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"layers\.1\.self_attn\..*": 3, "down_proj": 7},
        "alpha_pattern": {"layers.2.self_attn.v_proj": 40},
    },
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "embedding-dora": {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    "head-trained-whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


def trained(model: Any, directory: Path, *, seed: int = 1, **fields: Any) -> dict[str, Tensor]:
    """Puts an adapter with random values on a model, saves it, and returns the merged tensors."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", **fields})
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if value.requires_grad:
                noise = torch.randn(value.shape, generator=generator) * 0.1
                value.copy_(value + noise if "magnitude" in name else noise)
    wrapped.save_pretrained(directory)
    merged = wrapped.merge_and_unload()
    return {name: value.detach().clone() for name, value in merged.state_dict().items()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], *, ulps: int) -> None:
    """Equal within units of the last place of the larger of the value and 0.125."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        here = got[key]
        assert here.dtype == value.dtype, key
        unit = torch.finfo(value.dtype).eps * value.float().abs().clamp_min(0.125)
        away = ((here.float() - value.float()).abs() / unit).max()
        assert away <= ulps, (key, float(away))


@pytest.mark.parametrize("model_type", TARGETS)
def test_every_family_is_merged_as_peft_merges_it(model_type: str, tmp_path: Path) -> None:
    save_hf(tiny(model_type), tmp_path / "base")
    trained(tiny(model_type), tmp_path / "adapter", target_modules=TARGETS[model_type])
    like = trained(tiny(model_type), tmp_path / "again", target_modules=TARGETS[model_type])
    model = tiny(model_type, seed=9)
    model.load_state_dict(like)
    save_hf(model, tmp_path / "want")

    convert(tmp_path / "base", tmp_path / "out", form="hf", adapter=tmp_path / "adapter")

    assert_close(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "want"), ulps=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_lora_is_merged_as_peft_merges_it(
    variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model_type = "qwen2" if variant == "bias" else "llama"  # qwen2 has biases
    save_hf(tiny(model_type, dtype=dtype), tmp_path / "base")
    fields: dict[str, Any] = {"target_modules": PROJECTIONS, **VARIANTS[variant]}
    want = trained(tiny(model_type, dtype=dtype), tmp_path / "adapter", **fields)

    convert(tmp_path / "base", tmp_path / "out", form="hf", adapter=tmp_path / "adapter")

    # DoRA divides by norms, which PEFT adds up in another order and in the base's own type.
    ulps = (8 if dtype is torch.float32 else 3) if "dora" in variant else 1
    assert_close(hf_tensors(tmp_path / "out"), want, ulps=ulps)


def test_fp32_is_equal_bit_for_bit(tmp_path: Path) -> None:
    save_hf(tiny("llama"), tmp_path / "base")
    want = trained(tiny("llama"), tmp_path / "adapter", target_modules=PROJECTIONS)
    convert(tmp_path / "base", tmp_path / "out", form="hf", adapter=tmp_path / "adapter")
    got = hf_tensors(tmp_path / "out")
    differ = sum(int((got[key] != value).sum()) for key, value in want.items())
    # A BLAS may add up a product of few rows in another order than one of many.
    assert differ / sum(value.numel() for value in want.values()) < 1e-3


def test_two_adapters_with_weights(tmp_path: Path) -> None:
    base = tiny("llama")
    save_hf(base, tmp_path / "base")
    one = trained(tiny("llama"), tmp_path / "one", target_modules=["q_proj"], seed=1)
    two = trained(tiny("llama"), tmp_path / "two", target_modules=["q_proj", "up_proj"], seed=2)
    names: list[str | Path] = [tmp_path / "one", f"{tmp_path / 'two'}:0.5"]
    convert(tmp_path / "base", tmp_path / "out", form="hf", adapter=names)
    want = {key: one[key] + 0.5 * (two[key] - value) for key, value in base.state_dict().items()}
    assert_close(hf_tensors(tmp_path / "out"), want, ulps=4)


@pytest.mark.parametrize("variant", ["plain", "dora", "embedding", "head-trained-whole"])
def test_merging_before_and_after_a_change_of_naming_gives_the_same_bits(
    variant: str, tmp_path: Path
) -> None:
    save_hf(tiny("llama"), tmp_path / "base")
    fields: dict[str, Any] = {"target_modules": PROJECTIONS, **VARIANTS[variant]}
    trained(tiny("llama"), tmp_path / "adapter", **fields)
    adapter = tmp_path / "adapter"
    convert(tmp_path / "base", tmp_path / "merged", form="hf", adapter=adapter)
    convert(tmp_path / "merged", tmp_path / "before.pth", to="lingua", root="")
    convert(tmp_path / "base", tmp_path / "plain", form="dcp", to="lingua", chunks=3)
    convert(tmp_path / "plain", tmp_path / "after.pth", to="lingua", root="", adapter=adapter)
    convert(tmp_path / "base", tmp_path / "at-once.pth", to="lingua", root="", adapter=adapter)

    before = torch_tensors(tmp_path / "before.pth")
    assert_same(torch_tensors(tmp_path / "at-once.pth"), before)
    if variant != "dora":  # the norm of a row whose columns are in another order may differ
        assert_same(torch_tensors(tmp_path / "after.pth"), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_live_model_gets_the_bits_of_the_conversion(dtype: torch.dtype, tmp_path: Path) -> None:
    save_hf(tiny("llama", dtype=dtype), tmp_path / "base")
    trained(tiny("llama", dtype=dtype), tmp_path / "adapter", target_modules=PROJECTIONS)
    adapter = tmp_path / "adapter"
    convert(tmp_path / "base", tmp_path / "out", form="hf", adapter=adapter)
    model = tiny("llama", seed=5, dtype=dtype)
    load_init_weights(model, tmp_path / "base", adapter=adapter)
    want = hf_tensors(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_matrices_stored_inputs_by_outputs(fields: dict[str, Any], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=131, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    )
    save_hf(model, tmp_path / "base")
    wanted: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    want = trained(model, tmp_path / "adapter", **wanted, **fields)
    convert(tmp_path / "base", tmp_path / "out.pth", adapter=tmp_path / "adapter")
    found = torch_tensors(tmp_path / "out.pth")
    assert_close(found, {key: want[key] for key in found}, ulps=8 if fields else 1)


def test_experts_stacked_in_one_tensor(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": [], "r": 2, "lora_alpha": 6}
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        pad_token_id=None,
    )
    torch.manual_seed(3)
    model = GptOssForCausalLM(config)
    save_hf(model, tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    want = trained(model, tmp_path / "adapter", target_parameters=names, **fields)
    convert(tmp_path / "base", tmp_path / "out.pth", adapter=tmp_path / "adapter")
    assert_close(torch_tensors(tmp_path / "out.pth"), want, ulps=2)


STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_stacked_in_memory_and_split_in_files(model_type: str, tmp_path: Path) -> None:
    """transformers 5 holds experts in one tensor and publishes them one by one."""
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 6}
    save_hf(tiny(model_type), tmp_path / "base")
    assert any(".experts.1." in key for key in hf_tensors(tmp_path / "base"))
    adapter = tmp_path / "adapter"
    like = trained(tiny(model_type), adapter, target_parameters=STACKED, **fields)
    model = tiny(model_type, seed=9)
    model.load_state_dict(like)
    save_hf(model, tmp_path / "want")

    convert(tmp_path / "base", tmp_path / "out", form="hf", adapter=adapter)
    assert_close(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "want"), ulps=1)
    assert check(adapter, against=tmp_path / "base")

    live = tiny(model_type, seed=5)
    load_init_weights(live, tmp_path / "base", adapter=adapter)
    assert_close(dict(live.state_dict()), like, ulps=1)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_split_in_an_adapter_and_stacked_in_the_base(
    model_type: str, tmp_path: Path
) -> None:
    """An adapter of transformers 4, and a base as a trainer of today holds it in memory."""
    model = tiny(model_type)
    save_hf(model, tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    weights = hf_tensors(tmp_path / "base")
    pairs = factors(weights, ["gate_proj", "down_proj", "w1", "w2", "q_proj"])
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs))
    convert(tmp_path / "base", tmp_path / "want", form="hf", adapter=adapter)
    assert_close(hf_tensors(tmp_path / "want"), merged(weights, pairs), ulps=1)
    assets: dict[str, Any] = {"assets": tmp_path / "base"}
    convert(tmp_path / "memory.pth", tmp_path / "out", form="hf", adapter=adapter, **assets)
    assert_same(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "want"))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_an_old_adapter_that_is_carried_is_converted_by_peft(tmp_path: Path) -> None:
    """Keys stay as transformers 4 had them: PEFT knows how transformers 5 calls them."""
    save_hf(tiny("mixtral"), tmp_path / "base")
    weights = hf_tensors(tmp_path / "base")
    names = ["w1", "w2", "w3", "q_proj"]
    adapter = save_peft(
        tmp_path / "adapter", peft_tensors(factors(weights, names)), target_modules=names
    )
    convert(adapter, tmp_path / "carried")
    wrapped = peft.PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "carried")
    want = {key: value.detach() for key, value in wrapped.merge_and_unload().state_dict().items()}
    live = tiny("mixtral", seed=5)
    load_init_weights(live, tmp_path / "base", adapter=adapter)
    assert_close(dict(live.state_dict()), want, ulps=2)
