"""HF -> Lingua -> training on two ranks, saved by torch -> HF: the trainer's own logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dcpconv import convert
from lingua_model import LinguaModel
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp

RIGHT = 1e-4
"""Largest |logit difference| in fp32."""


@pytest.fixture(scope="module")
def step(wild: Path) -> Path:
    return wild / "lingua/0000000003"


@pytest.fixture(scope="module")
def trained(wild: Path) -> dict[str, torch.Tensor]:
    found = torch.load(wild / "lingua/logits.pt", weights_only=True)
    assert isinstance(found, dict)
    return found


def test_a_trained_step_becomes_an_hf_model_with_the_trainers_logits(
    wild: Path, step: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    report = convert(step, tmp_path / "hf")

    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        logits = model.eval()(trained["tokens"]).logits
        before = AutoModelForCausalLM.from_pretrained(wild / "lingua/hf")(trained["tokens"]).logits
    assert float((logits - trained["logits"]).abs().max()) < RIGHT
    assert float((before - trained["logits"]).abs().max()) > 100 * RIGHT, "nothing was trained"
    assert any(key.startswith("optim.state.") for key in report.left)


def test_the_whole_step_goes_over_with_its_optimizer(step: Path, tmp_path: Path) -> None:
    expected = nested_of_dcp(step)

    convert(step, tmp_path / "all.pth")
    convert(step, tmp_path / "dcp", form="dcp", chunks=4)

    found = torch.load(tmp_path / "all.pth", weights_only=True)
    for one in (found, nested_of_dcp(tmp_path / "dcp")):
        assert set(one) == {"model", "optim"}
        assert_same_bits(flat(one), flat(expected))
        assert one["optim"]["param_groups"] == expected["optim"]["param_groups"]  # type: ignore[index]


def test_only_the_model_makes_what_linguas_generate_loads(
    step: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    convert(step, tmp_path / "consolidated.pth", only="model")

    found = torch.load(tmp_path / "consolidated.pth", weights_only=True)
    assert set(found) == {"model"}
    model = LinguaModel.from_params(json.loads((step / "params.json").read_text()))
    model.load_state_dict(found["model"], strict=True)
    with torch.no_grad():
        assert float((model(trained["tokens"]) - trained["logits"]).abs().max()) < RIGHT
