"""Reward models and classifiers: their scores go over where the other class has them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import NotExpressibleError
from support.checkpoints.families import RIGHT, TOKENS, assert_same, hf_tensors
from support.models.hf_models import tiny
from support.models.layers import randomise

CASES = [
    pytest.param("smollm3", "SmolLM3", 3, {}, id="smollm3"),
    pytest.param("smollm3", "SmolLM3", 1, {"tie_word_embeddings": True}, id="one-score-and-tied"),
    pytest.param("seed_oss", "SeedOss", 3, {"attention_bias": False}, id="seed_oss"),
    pytest.param("ministral3", "Ministral3", 2, {"num_hidden_layers": 11}, id="eleven-layers"),
    pytest.param("internlm3", "Llama", 5, {}, id="internlm3"),
]
ENDINGS = ["ForSequenceClassification", "ForTokenClassification"]


def scoring(directory: Path, name: str, config: Any, n_classes: int) -> nn.Module:
    config.num_labels, config.pad_token_id = n_classes, 0
    model = getattr(transformers, name)(config)
    randomise(model)
    model.eval().save_pretrained(directory)
    return model  # type: ignore[no-any-return]


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(TOKENS[:1]).logits)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(("model_type", "stem", "n_classes", "overrides"), CASES)
def test_a_llama_gives_the_scores_and_the_way_back_is_exact(
    tmp_path: Path,
    model_type: str,
    stem: str,
    n_classes: int,
    overrides: dict[str, Any],
    ending: str,
) -> None:
    config = tiny(model_type, **overrides).config
    model = scoring(tmp_path / "hf", stem + ending, config, n_classes)
    assert check(tmp_path / "hf", to="hf-llama")
    convert(tmp_path / "hf", tmp_path / "llama", form="hf", to="hf-llama")
    written = json.loads((tmp_path / "llama/config.json").read_text())
    assert written["architectures"] == [f"Llama{ending}"]
    llama_class = getattr(transformers, f"Llama{ending}")
    llama = llama_class.from_pretrained(tmp_path / "llama", attn_implementation="eager").eval()
    assert llama.config.num_labels == n_classes
    assert float((scores(llama) - scores(model)).abs().max()) < RIGHT

    convert(tmp_path / "llama", tmp_path / "back", form="hf", to=f"hf-{model_type}")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hf"))

    with torch.device("meta"):
        fresh = llama_class(llama.config)
    load_init_weights(fresh, tmp_path / "hf")
    assert_same(dict(fresh.state_dict()), dict(llama.state_dict()))


@pytest.mark.parametrize("to", ["lingua", "meta", "torchtitan-llama3", "hf-cwm"])
@pytest.mark.parametrize(
    ("ending", "names"),
    [("ForSequenceClassification", {"score"}), ("ForTokenClassification", {"score", "score_bias"})],
)
def test_a_family_without_scores_refuses_them_by_name(
    tmp_path: Path, to: str, ending: str, names: set[str]
) -> None:
    scoring(tmp_path / "hf", f"Llama{ending}", tiny("llama").config, 3)
    with pytest.raises(NotExpressibleError) as raised:
        convert(tmp_path / "hf", tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused == names
    assert {fault.key for fault in check(tmp_path / "hf", to=to).refused} == names
