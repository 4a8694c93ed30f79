"""check() against live transformers models, whose keys in memory are not always those of files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dcpconv import check
from dcpconv.testing import assert_covers
from support.models.hf_models import MODEL_TYPES, save_hf, tiny


@pytest.fixture(scope="module", params=sorted(set(MODEL_TYPES) - {"mistral"}))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny(request.param)
    return model, save_hf(model, tmp_path_factory.mktemp(request.param))


def test_what_save_pretrained_writes_is_complete(saved: Any) -> None:
    _, directory = saved
    coverage = check(directory)
    assert coverage, coverage.counts()
    assert {target.key for target in coverage.targets} == load_file(
        directory / "model.safetensors"
    ).keys()


def test_a_live_model_takes_its_own_files(saved: Any) -> None:
    model, directory = saved
    assert_covers(model.to("meta"), directory)


def test_one_tensor_less_is_one_key_less(saved: Any, tmp_path: Path) -> None:
    model, directory = saved
    tensors = load_file(directory / "model.safetensors")
    names = ("up_proj", ".w3.", "input_linear", "c_fc.w", "dense_h_to_4h.w", "fc1.w")
    layer = re.compile(r"(layers|h)\.1\.")
    lost = next(k for k in tensors if layer.search(k) and any(name in k for name in names))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    coverage = check(tmp_path, against=model.to("meta"))
    assert not coverage
    missing = [fault.key for fault in coverage.missing]
    assert len(missing) == 1
    assert missing[0] in model.state_dict()
    if missing[0] != lost:
        assert lost in coverage.missing[0].why  # it says which stored tensor it needs


def test_one_layer_more_in_the_config_is_missing_layers(saved: Any, tmp_path: Path) -> None:
    _, directory = saved
    config = json.loads((directory / "config.json").read_text())
    counted = next(n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in config)
    config[counted] += 1
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(config.get(name), list):
            config[name].append(config[name][-1])
    (tmp_path / "config.json").write_text(json.dumps(config))
    coverage = check(directory, against=tmp_path / "config.json")
    assert not coverage
    assert coverage.missing
    numbers = [re.search(r"\.(\d+)\.", fault.key) for fault in coverage.missing]
    assert {found[1] for found in numbers if found} == {"3"}
    assert all(numbers)
    assert not coverage.unknown
