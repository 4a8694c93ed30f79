"""The account of published files under the keys of a live transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaModel, conversion_mapping
from transformers import core_model_loading as core

from dcpconv import check, load_init_weights
from dcpconv.core.errors import CoverageError, NotExpressibleError
from dcpconv.sources.live_models import live_model
from support.models.hf_models import save_hf, tiny

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
STACKED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[Any, Path]:
    model = tiny("mixtral")
    return model, save_hf(model, tmp_path / "origin")


def changed(origin: Path, target: Path, change: Any) -> Path:
    """A copy with other tensors."""
    target.mkdir()
    tensors = load_file(origin / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((origin / "config.json").read_text())
    return target


def fails(model: Any, source: Path) -> str:
    with pytest.raises(CoverageError) as caught:
        load_init_weights(model, source)
    return str(caught.value)


def test_a_lost_expert_is_named_and_nothing_else_is(
    mixtral: tuple[Any, Path], tmp_path: Path
) -> None:
    model, origin = mixtral
    source = changed(origin, tmp_path / "less", lambda tensors: tensors.pop(EXPERT))
    coverage = check(source, against=model)
    assert [(fault.key, fault.why) for fault in coverage.missing] == [(STACKED, f"needs {EXPERT}")]
    assert not coverage.unknown
    text = fails(model, source)
    assert "1 missing;" in text
    assert f"{STACKED}  needs {EXPERT}" in text


def test_an_expert_of_another_shape_is_named(mixtral: tuple[Any, Path], tmp_path: Path) -> None:
    model, origin = mixtral

    def shorter(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT][:-1].clone()

    source = changed(origin, tmp_path / "shorter", shorter)
    (fault,) = check(source, against=model).missing
    assert fault.why.startswith(f"{EXPERT} [151, 96] is unlike")
    assert EXPERT in fails(model, source)


def test_all_experts_of_another_shape_are_one_misshapen_tensor(
    mixtral: tuple[Any, Path], tmp_path: Path
) -> None:
    model, origin = mixtral

    def shorter(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if "layers.1." in key and ".w" in key and "w2" not in key and "experts" in key:
                tensors[key] = tensors[key][:-1].clone()

    (fault,) = check(changed(origin, tmp_path / "all", shorter), against=model).misshapen
    assert (fault.key, fault.expected, fault.found) == (STACKED, "[5, 304, 96]", "[5, 302, 96]")


def test_two_keys_for_one_tensor_are_one_too_many(
    mixtral: tuple[Any, Path], tmp_path: Path
) -> None:
    model, origin = mixtral
    gate = "model.layers.0.mlp.gate.weight"
    source = changed(
        origin,
        tmp_path / "twice",
        lambda tensors: tensors.update(
            {gate: tensors["model.layers.0.block_sparse_moe.gate.weight"].clone()}
        ),
    )
    (fault,) = check(source, against=model).unknown
    assert f"is {gate} already" in fault.why


def test_heads_come_and_go(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    origin = save_hf(model, tmp_path / "head")
    base = LlamaModel(model.config)
    report = load_init_weights(base, origin, strict=False)
    assert [fault[0] for fault in report.unexpected] == ["lm_head.weight"]
    assert all(torch.equal(t, model.model.state_dict()[k]) for k, t in base.state_dict().items())
    assert "unexpected lm_head.weight" in fails(base, origin)

    headless = save_hf(base, tmp_path / "base")
    again = LlamaForCausalLM(model.config)
    text = fails(again, headless)
    assert "1 missing;" in text
    assert "missing   lm_head.weight" in text


def test_a_tied_head_needs_no_tensor_of_its_own(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    base = save_hf(model.model, tmp_path / "base")
    fresh = tiny("llama", tie_word_embeddings=True, seed=1)
    load_init_weights(fresh, base)
    assert torch.equal(fresh.lm_head.weight, model.model.embed_tokens.weight)
    assert check(base, against=fresh)


class _Doubled(core.ConversionOps):  # type: ignore[misc]
    def convert(self, input_dict: Any, **_unused: Any) -> Any:
        return input_dict


@pytest.fixture
def _new_operation() -> Iterator[None]:
    conversion_mapping.register_checkpoint_conversion_mapping(
        "LlamaForCausalLM",
        [core.WeightConverter("q_proj.weight", "q_proj.weight", [_Doubled()])],
    )
    yield
    conversion_mapping._checkpoint_conversion_mapping_cache.pop("LlamaForCausalLM")
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("LlamaForCausalLM")


@pytest.mark.usefixtures("_new_operation")
def test_an_operation_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    origin = tmp_path / "origin"
    origin.mkdir()
    save_file({k: t + 1 for k, t in before.items()}, origin / "model.safetensors")
    (origin / "config.json").write_text(model.config.to_json_string())
    with pytest.raises(NotExpressibleError, match="_Doubled") as caught:
        load_init_weights(model, origin)
    assert "layers.0.self_attn.q_proj.weight" in str(caught.value)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    coverage = check(origin, against=model)
    assert len(coverage.refused) == 3
    assert "_Doubled" in coverage.refused[0].why


def test_only_classes_of_transformers_have_published_names() -> None:
    assert live_model(torch.nn.Linear(2, 3)) is None
    assert live_model({"weight": torch.zeros(2)}) is None
    found = live_model(torch.nn.parallel.DataParallel(tiny("llama")))
    assert found is not None
    assert found.name == "LlamaForCausalLM"
