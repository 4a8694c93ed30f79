"""Adapters merged on the way, against ``W + scale * B @ A`` computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dcpconv import check, convert
from dcpconv.core.errors import (
    CoverageError,
    FormatError,
    NotACheckpointError,
    NotExpressibleError,
)
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader
from support.checkpoints.adapters import (
    PREFIX,
    assert_near,
    config,
    factors,
    merged,
    peft_tensors,
    save_peft,
)
from support.checkpoints.families import assert_same, hf_tensors, torch_tensors
from support.checkpoints.scaled_blocks import published
from support.models.hf_models import save_hf, tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_hf(tiny("llama"), tmp_path / "base")


@pytest.mark.parametrize("is_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("form", ["hf", "dcp", "torch"])
def test_every_form_of_a_result(form: Any, *, is_bin: bool, base: Path, tmp_path: Path) -> None:
    weights = hf_tensors(base)
    pairs = factors(weights, MODULES)
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs), is_bin=is_bin)
    out = tmp_path / ("out.pth" if form == "torch" else "out")
    report = convert(base, out, form=form, adapter=adapter)
    if form == "dcp":
        convert(out, tmp_path / "back", form="hf")
    found = torch_tensors(out) if form == "torch" else hf_tensors(out)
    found = hf_tensors(tmp_path / "back") if form == "dcp" else found
    assert_near(found, merged(weights, pairs))
    assert report.merged == len(pairs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_sum_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    base = save_hf(tiny("llama", dtype=torch.bfloat16), tmp_path / "base")
    weights = hf_tensors(base)
    pairs = factors(weights, MODULES)
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs))
    convert(base, tmp_path / "out", form="hf", adapter=adapter, dtype=dtype)
    target = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    wide = merged({k: v.float() for k, v in weights.items()}, pairs)
    wanted = {k: v.to(target if v.dim() > 1 else weights[k].dtype) for k, v in wide.items()}
    assert_near(hf_tensors(tmp_path / "out"), wanted)


def test_what_the_adapter_does_not_touch_keeps_its_bits(tmp_path: Path) -> None:
    base = save_hf(tiny("glm"), tmp_path / "base")
    weights = hf_tensors(base)
    weights["model.layers.0.self_attn.k_proj.weight"][::2] = -0.0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    pairs = factors(weights, ["q_proj"])
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs))
    convert(base, tmp_path / "fused.pth", to="chatglm3", root="")
    convert(tmp_path / "fused.pth", tmp_path / "back", form="hf", assets=base, adapter=adapter)
    found = hf_tensors(tmp_path / "back")
    assert_near(found, merged(weights, pairs))
    for name, value in weights.items():
        if "q_proj" not in name:
            assert torch.equal(found[name].signbit(), value.signbit()), name


def test_factors_go_where_a_fused_base_keeps_their_matrix(tmp_path: Path) -> None:
    """A base in ChatGLM's naming has q, k and v in one matrix; the adapter knows three."""
    base = save_hf(tiny("glm"), tmp_path / "base")
    pairs = factors(hf_tensors(base), ["q_proj", "k_proj", "v_proj", "down_proj"])
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs))
    convert(base, tmp_path / "fused.pth", to="chatglm3", root="")
    assets: dict[str, Any] = {"assets": base}
    convert(tmp_path / "fused.pth", tmp_path / "merged.pth", adapter=adapter, **assets)
    convert(tmp_path / "merged.pth", tmp_path / "back", form="hf", **assets)
    assert_near(hf_tensors(tmp_path / "back"), merged(hf_tensors(base), pairs))


def test_an_adapter_of_a_fused_matrix_is_split_with_it(tmp_path: Path) -> None:
    """ChatGLM's own finetuning adapts ``query_key_value``; GLM in transformers has three."""
    base = save_hf(tiny("glm"), tmp_path / "base")
    convert(base, tmp_path / "fused.pth", to="chatglm3", root="")
    fused = torch_tensors(tmp_path / "fused.pth")
    pairs = factors(fused, ["query_key_value"])
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs))
    convert(tmp_path / "fused.pth", tmp_path / "a", form="hf", assets=base, adapter=adapter)
    convert(base, tmp_path / "b", form="hf", adapter=adapter)
    torch.save(merged(fused, pairs), tmp_path / "by-hand.pth")
    convert(tmp_path / "by-hand.pth", tmp_path / "want", form="hf", assets=base)
    assert_near(hf_tensors(tmp_path / "a"), hf_tensors(tmp_path / "want"))
    assert_same(hf_tensors(tmp_path / "a"), hf_tensors(tmp_path / "b"))


def test_tiles_shards_and_threads_leave_no_trace(base: Path, tmp_path: Path) -> None:
    pairs = factors(hf_tensors(base), MODULES)
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs))
    convert(base, tmp_path / "one", form="hf", adapter=adapter, jobs=1)
    convert(base, tmp_path / "many", form="dcp", adapter=adapter, jobs=4, chunks=7)
    convert(tmp_path / "many", tmp_path / "back", form="hf")
    whole = hf_tensors(tmp_path / "one")
    assert_same(hf_tensors(tmp_path / "back"), whole)
    state = {"lm_head.weight": torch.zeros_like(whole["lm_head.weight"])} | {
        key: torch.zeros_like(value) for key, value in whole.items()
    }
    dcp_load(state, storage_reader=CheckpointReader(base, adapter=adapter))
    assert_same(state, whole)


def test_scaled_blocks_are_multiplied_out_first(tmp_path: Path) -> None:
    base, worth = published(tmp_path, "llama")
    pairs = factors(worth, ["q_proj", "down_proj"])
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs))
    convert(base, tmp_path / "out", form="hf", dequantize=True, dtype="fp32", adapter=adapter)
    assert_near(hf_tensors(tmp_path / "out"), merged(worth, pairs))
    with pytest.raises(CoverageError, match="dequantize"):
        convert(base, tmp_path / "raw", form="hf", adapter=adapter)


def test_dora_by_hand(base: Path, tmp_path: Path) -> None:
    weights = hf_tensors(base)
    pairs = factors(weights, ["q_proj", "up_proj"])
    tensors, wanted = peft_tensors(pairs), merged(weights, pairs)
    generator = torch.Generator().manual_seed(4)
    for module in pairs:
        magnitude = torch.rand(weights[f"{module}.weight"].shape[0], generator=generator) + 0.5
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
        total = wanted[f"{module}.weight"].double()
        wanted[f"{module}.weight"] = (total * (magnitude / total.norm(dim=1))[:, None]).float()
    adapter = save_peft(tmp_path / "adapter", tensors, use_dora=True)
    convert(base, tmp_path / "out", form="hf", adapter=adapter)
    found = hf_tensors(tmp_path / "out")
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_minimind_adds_its_lora_without_a_scale(prefix: str, base: Path, tmp_path: Path) -> None:
    weights = hf_tensors(base)
    pairs = factors(weights, ["q_proj", "o_proj"])
    state = {}
    for module, (a, b) in pairs.items():
        state[f"{prefix}{module}.lora.A.weight"] = a
        state[f"{prefix}{module}.lora.B.weight"] = b
    torch.save(state, tmp_path / "lora_medical_96.pth")
    convert(base, tmp_path / "out", form="hf", adapter=tmp_path / "lora_medical_96.pth")
    assert_near(hf_tensors(tmp_path / "out"), merged(weights, pairs, 1.0))


def test_an_adapter_inside_a_checkpoint(base: Path, tmp_path: Path) -> None:
    """Trainer under FSDP leaves a DCP of the adapter, its config one directory above."""
    weights = hf_tensors(base)
    pairs = factors(weights, MODULES)
    step = tmp_path / "checkpoint-4"
    inner = step / "pytorch_model_fsdp_0"
    state: dict[str, Any] = {"model": peft_tensors(pairs, "default")}
    dcp_save(state, checkpoint_id=str(inner))
    with pytest.raises(NotACheckpointError, match="says what to multiply it by"):
        convert(base, tmp_path / "out", form="hf", adapter=inner)
    (step / "adapter_config.json").write_text(json.dumps(config()))
    convert(base, tmp_path / "out", form="hf", adapter=inner)
    assert_near(hf_tensors(tmp_path / "out"), merged(weights, pairs))


def test_a_head_that_was_tied_gets_values_of_its_own(tmp_path: Path) -> None:
    base = save_hf(tiny("llama", tie_word_embeddings=True), tmp_path / "base")
    weights = hf_tensors(base)
    head = torch.randn_like(weights["model.embed_tokens.weight"])
    tensors = peft_tensors(factors(weights, ["q_proj"])) | {f"{PREFIX}lm_head.weight": head}
    adapter = save_peft(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    convert(base, tmp_path / "out", form="hf", adapter=adapter)
    found = hf_tensors(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], head)
    assert torch.equal(found["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    model = tiny("llama", seed=5)
    load_init_weights(model, base, adapter=adapter)
    assert_same({key: value for key, value in model.state_dict().items() if key in found}, found)


@pytest.mark.parametrize("keeps", [False, True], ids=["apart", "kept"])
@pytest.mark.parametrize("first", ["hf", "lingua", "torch"])
def test_an_embedding_trained_whole_leaves_a_tied_head_as_peft_does(
    tmp_path: Path, first: str, *, keeps: bool
) -> None:
    """PEFT trains a copy of the embedding; the head keeps the base's, unless it says otherwise."""
    base = save_hf(tiny("llama", tie_word_embeddings=True), tmp_path / "base")
    weights = hf_tensors(base)
    old = weights["model.embed_tokens.weight"]
    new = torch.randn_like(old)
    tensors = peft_tensors(factors(weights, ["q_proj"])) | {
        f"{PREFIX}model.embed_tokens.weight": new
    }
    adapter = save_peft(
        tmp_path / "adapter", tensors, modules_to_save=["embed_tokens"], ensure_weight_tying=keeps
    )
    source = base
    if first != "hf":
        source = tmp_path / ("x.pth" if first == "torch" else "x")
        if first == "lingua":
            convert(base, source, to="lingua")
        else:  # both names of one storage, as state_dict() has them
            torch.save(tiny("llama", tie_word_embeddings=True).state_dict(), source)
    convert(source, tmp_path / "out", form="hf", adapter=adapter, assets=base)

    found = hf_tensors(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert torch.equal(found["model.embed_tokens.weight"], new)
    assert config["tie_word_embeddings"] is keeps
    assert ("lm_head.weight" in found) is not keeps
    assert keeps or torch.equal(found["lm_head.weight"], old)


def test_everything_that_does_not_fit_is_listed(base: Path, tmp_path: Path) -> None:
    weights = hf_tensors(base)
    pairs = factors(weights, ["q_proj"])
    module = "model.layers.0.self_attn.q_proj"
    pairs[module] = (pairs[module][0], pairs[module][1][:-3])
    a, b = pairs["model.layers.1.self_attn.q_proj"]
    pairs["model.layers.7.self_attn.q_proj"] = a.clone(), b.clone()
    tensors = peft_tensors(pairs) | {f"{PREFIX}score.weight": torch.ones(2, 96)}
    adapter = save_peft(tmp_path / "adapter", tensors, modules_to_save=["score"])
    with pytest.raises(CoverageError) as caught:
        convert(base, tmp_path / "out", form="hf", adapter=adapter)
    text = str(caught.value)
    for key in (f"{module}.weight", "model.layers.7.self_attn.q_proj.weight", "score.weight"):
        assert key in text
    assert not (tmp_path / "out").exists()
    coverage = check(adapter, against=base)
    assert not coverage
    assert {f.key for f in coverage.missing} == {
        "model.layers.7.self_attn.q_proj.weight",
        "score.weight",
    }
    assert [f.key for f in coverage.misshapen] == [f"{module}.weight"]


def test_check_says_that_an_adapter_fits(base: Path, tmp_path: Path) -> None:
    pairs = factors(hf_tensors(base), MODULES)
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs))
    for against in (base, base / "config.json"):
        coverage = check(adapter, against=against)
        assert coverage
        assert len(coverage.targets) == len(pairs)
    convert(base, tmp_path / "other", form="dcp", to="lingua")
    assert check(adapter, against=tmp_path / "other")


REFUSED: dict[str, dict[str, Any]] = {
    "IA3": {"peft_type": "IA3"},
    "PREFIX_TUNING": {"peft_type": "PREFIX_TUNING"},
    "PiSSA": {"init_lora_weights": "pissa_niter_16"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "use_novel_trick": {"use_novel_trick": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_is_refused_by_name(name: str, base: Path, tmp_path: Path) -> None:
    tensors = peft_tensors(factors(hf_tensors(base), ["q_proj"]))
    adapter = save_peft(tmp_path / "adapter", tensors, **REFUSED[name])
    with pytest.raises(NotExpressibleError, match=name):
        convert(base, tmp_path / "out", form="hf", adapter=adapter)
    assert not (tmp_path / "out").exists()


def _without_b(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in tensors.items()
        if "layers.1.self_attn.q_proj.lora_B" not in key
    }


def _emptied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.flatten()[:0] for key, value in tensors.items()}


def _one_emptied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(iter(tensors))
    return {**tensors, key: tensors[key][:0]}


@pytest.mark.parametrize(
    ("harm", "fields", "says"),
    [
        pytest.param(_without_b, {}, "lora_B", id="half-a-pair"),
        pytest.param(_emptied, {}, "ZeRO-3", id="not-gathered"),
        pytest.param(_one_emptied, {}, "1 of the adapter's", id="one-not-gathered"),
        pytest.param(dict, {"r": 8}, "where r is 8", id="another-rank"),
        pytest.param(dict, {"r": "4"}, "no number of ranks", id="rank-in-words"),
        pytest.param(dict, {"lora_alpha": None}, "no number", id="no-alpha"),
        pytest.param(dict, {"rank_pattern": {"(": 4}}, "no pattern", id="pattern-cut-short"),
        pytest.param(dict, {"use_dora": True}, "use_dora", id="no-magnitudes"),
    ],
)
def test_an_adapter_that_is_not_whole(
    harm: Any, fields: dict[str, Any], says: str, base: Path, tmp_path: Path
) -> None:
    tensors = harm(peft_tensors(factors(hf_tensors(base), ["q_proj"])))
    adapter = save_peft(tmp_path / "adapter", tensors, **fields)
    with pytest.raises(FormatError, match=says):
        convert(base, tmp_path / "out", form="hf", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_tensors_hold_nothing_is_refused_everywhere(
    base: Path, tmp_path: Path
) -> None:
    """What ZeRO-3 leaves where a run saves without gathering; also a head trained whole."""
    tensors = peft_tensors(factors(hf_tensors(base), ["q_proj"]))
    tensors[f"{PREFIX}lm_head.weight"] = torch.empty(0)
    adapter = save_peft(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    for act in (
        lambda: convert(adapter, tmp_path / "out"),
        lambda: convert(base, tmp_path / "out", form="hf", adapter=adapter),
        lambda: check(adapter),
        lambda: check(adapter, against=base),
        lambda: load_init_weights(tiny("llama"), base, adapter=adapter),
    ):
        with pytest.raises(FormatError, match=r"lm_head\.weight  \[0\]") as caught:
            act()
        assert "gathering" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_square_experts_need_a_parameter_file(tmp_path: Path) -> None:
    """Whether inputs or outputs come first is nothing that their shape could tell."""
    stack = {"mlp.experts.down_proj": torch.zeros(3, 8, 8)}
    save_file(stack, tmp_path / "base.safetensors")
    pair = {"mlp.experts": (torch.ones(6, 8), torch.ones(8, 6))}
    fields: dict[str, Any] = {"target_parameters": ["mlp.experts.down_proj"], "r": 2}
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pair), **fields)
    with pytest.raises(CoverageError, match="no parameter file says"):
        convert(tmp_path / "base.safetensors", tmp_path / "out.pth", adapter=adapter)


def test_an_adapter_alone_stays_an_adapter(base: Path, tmp_path: Path) -> None:
    tensors = peft_tensors(factors(hf_tensors(base), ["q_proj"]))
    adapter = save_peft(tmp_path / "adapter", tensors, is_bin=True)
    report = convert(adapter, tmp_path / "out")
    assert_same(load_file(tmp_path / "out/adapter_model.safetensors"), tensors)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == config()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert any("adapter" in note for note in report.notes)
    with pytest.raises(NotExpressibleError, match="adapter without its base"):
        convert(adapter, tmp_path / "no", form="dcp")
    with pytest.raises(NotExpressibleError, match="adapter without its base"):
        convert(adapter, tmp_path / "no", to="lingua")
    torch.save(tensors, tmp_path / "factors.pth")
    with pytest.raises(NotExpressibleError, match="tensors of an adapter"):
        convert(tmp_path / "factors.pth", tmp_path / "no", form="hf", assets=base)
    assert not (tmp_path / "no").exists()


def test_a_base_says_that_an_adapter_lies_beside_it(base: Path, tmp_path: Path) -> None:
    pairs = factors(hf_tensors(base), ["q_proj"])
    weights = hf_tensors(base)
    save_file(peft_tensors(pairs), base / "adapter_model.safetensors")
    (base / "adapter_config.json").write_text(json.dumps(config()))
    report = convert(base, tmp_path / "out", form="hf")
    assert any(f"--adapter {base} merges it" in note for note in report.notes)
    assert_same(hf_tensors(tmp_path / "out"), weights)
    convert(base, tmp_path / "merged", form="hf", adapter=base)
    assert_near(hf_tensors(tmp_path / "merged"), merged(weights, pairs))
