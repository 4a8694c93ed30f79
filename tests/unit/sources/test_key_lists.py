"""Key lists: what a team commits, and keys of live models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import check
from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.key_lists import is_keylist, read_keylist, read_model, to_text
from dcpconv.sources.recognition import recognise
from support.checkpoints.check_cases import llama_shapes, write_hf


def listed(path: Path) -> str:
    return to_text(recognise(open_checkpoint(path)))


def test_a_list_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "a", llama_shapes())
    file = tmp_path / "keys.json"
    file.write_text(listed(source))
    catalog, family = read_keylist(file)
    assert is_keylist(file)
    assert family == "hf-llama"
    assert {key: entry.shape for key, entry in catalog.tensors.items()} == llama_shapes()
    assert {entry.dtype.label for entry in catalog.tensors.values()} == {"bf16"}


def test_one_tensor_is_one_line_so_that_a_change_is_a_readable_diff(tmp_path: Path) -> None:
    before = listed(write_hf(tmp_path / "a", llama_shapes())).splitlines()
    changed = {**llama_shapes(), "model.norm.weight": (7,)}
    after = listed(write_hf(tmp_path / "b", changed)).splitlines()
    different = [line for line in after if line not in before]
    assert different == ['    "model.norm.weight": {"dtype": "bf16", "shape": [7]},']


def test_keys_lose_their_container_and_the_optimizer_stays_out(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    file = tmp_path / "training.pth"
    torch.save({"model": model.state_dict(), "step": 3}, file)
    names = json.loads(listed(file))["tensors"]
    assert names.keys() == {"weight", "bias"}


def test_a_list_is_a_source_too(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "a", llama_shapes())
    keys = tmp_path / "keys.json"
    command = [sys.executable, "-m", "dcpconv", "keys", str(source), "-o", str(keys)]
    subprocess.run(command, check=True)
    assert check(keys, to="lingua", assets=source)
    assert check(keys, against=source)


def test_a_config_in_the_same_directory_does_not_speak_for_a_list(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "a", llama_shapes())
    (tmp_path / "keys.json").write_text(listed(source))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    assert check(tmp_path / "keys.json", against=source)


MALFORMED = [
    pytest.param("[]", id="no-object"),
    pytest.param('{"dcpconv_keys": 2, "tensors": {}}', id="another-version"),
    pytest.param('{"dcpconv_keys": 1}', id="no-tensors"),
    pytest.param('{"dcpconv_keys": 1, "tensors": [1]}', id="tensors-are-a-list"),
    pytest.param('{"dcpconv_keys": 1, "tensors": {}, "family": 3}', id="family-is-a-number"),
    pytest.param('{"dcpconv_keys": 1, "tensors": {"a": {}}}', id="no-shape"),
    pytest.param('{"dcpconv_keys": 1, "tensors": {"a": 3}}', id="record-is-a-number"),
    pytest.param(
        '{"dcpconv_keys": 1, "tensors": {"a": {"dtype": "bf16", "shape": [-1]}}}', id="negative"
    ),
    pytest.param(
        '{"dcpconv_keys": 1, "tensors": {"a": {"dtype": "bf16", "shape": [true]}}}', id="bool"
    ),
    pytest.param('{"dcpconv_keys": 1, "tensors": {"a": {"dtype": "x", "shape": [1]}}}', id="dtype"),
    pytest.param('{"dcpconv_keys": 1, "tensors": {}, "tied": {"a": "b"}}', id="tied-to-nothing"),
    pytest.param('{"dcpconv_keys": 1, "tensors": {', id="cut-off"),
    pytest.param("[" * 100_000, id="nested-too-deeply"),
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_list_is_one_clear_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(FormatError) as error:
        read_keylist(file)
    assert ("file", file) in error.value.facts
    assert error.value.hint


def test_every_bad_record_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    records = {"a": 1, "b": {"dtype": "bf16", "shape": [1]}, "c": {"shape": [1]}}
    file.write_text(json.dumps({"dcpconv_keys": 1, "tensors": records}))
    with pytest.raises(FormatError) as error:
        read_keylist(file)
    assert [str(value)[0] for label, value in error.value.facts if label == "key"] == ["a", "c"]


class Tied(torch.nn.Module):
    """An embedding, a head that shares it, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_live_model_has_the_keys_of_its_state_dict(device: str) -> None:
    with torch.device(device):
        catalog: Catalog = read_model(Tied())
    found = {key: (e.shape, e.dtype.name) for key, e in catalog.tensors.items()}
    assert found == {
        "embed.weight": ((5, 3), "bfloat16"),
        "head.weight": ((5, 3), "bfloat16"),
        "count": ((), "int64"),
    }
    assert catalog.tied == {"head.weight": "embed.weight"}


def test_a_compiled_or_checkpointed_model_has_the_keys_inside(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        key.replace("self_attn.", "_orig_mod.self_attn."): torch.empty(shape, device="meta")
        for key, shape in llama_shapes().items()
    }
    assert check(write_hf(tmp_path, llama_shapes()), against=state)
