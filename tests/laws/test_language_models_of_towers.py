"""The language model of a model with a tower: renamed alone, its tower kept beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import check, convert, load_init_weights
from support.checkpoints.families import RIGHT, assert_same, difference, hf_tensors, load_hf
from support.models.hf_models import save_hf
from support.models.nested_models import LINEAR, QWEN_VISION, ROUTED, TEXT, nested

SMALL = {**TEXT, **LINEAR}
QWEN = {"vision_config": dict(QWEN_VISION)}
CASES = [
    pytest.param(
        "Qwen3_5ForConditionalGeneration", "qwen3_5", SMALL, QWEN, "hf-qwen3_5_text", id="qwen3_5"
    ),
    pytest.param(
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        {**SMALL, **ROUTED},
        QWEN,
        "hf-qwen3_5_moe_text",
        id="qwen3_5_moe",
    ),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("name", "model_type", "text", "towers", "to"), CASES)
def test_the_language_model_alone_computes_the_same_and_the_tower_comes_back(
    tmp_path: Path,
    name: str,
    model_type: str,
    text: dict[str, Any],
    towers: dict[str, Any],
    to: str,
    *,
    tied: bool,
) -> None:
    model = nested(
        name,
        model_type,
        {**text, "tie_word_embeddings": tied},
        tie_word_embeddings=tied,
        **towers,
    )
    source = save_hf(model, tmp_path / "hf")
    assert check(source, to=to)
    convert(source, tmp_path / "text", form="hf", to=to)
    written = json.loads((tmp_path / "text/config.json").read_text())
    assert f"hf-{written['model_type']}" == to
    alone = load_hf(tmp_path / "text")
    assert difference(alone, model) < RIGHT

    kept = [f for f in (tmp_path / "text").glob("*.safetensors") if not f.name.startswith("model")]
    assert len(kept) == 1
    convert(tmp_path / "text", tmp_path / "back", form="hf", to=f"hf-{model_type}", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))

    with torch.device("meta"):
        fresh = type(alone)(alone.config)
    load_init_weights(fresh, source)
    assert_same(dict(fresh.state_dict()), dict(alone.state_dict()))
