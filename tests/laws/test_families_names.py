"""Meta's names and parameter file, and what its releases store beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dcpconv import convert
from dcpconv.families.configs import read_spec
from dcpconv.families.keymaps import keymaps
from lingua_model import LinguaModel
from support.checkpoints.families import RIGHT, assert_same, difference, hf_tensors, torch_tensors
from support.models.hf_models import save_hf, tiny


@pytest.mark.parametrize("tied", [False, True])
def test_meta_names_and_params_make_the_same_model(tmp_path: Path, *, tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied, num_hidden_layers=11)
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "meta", form="dcp", to="meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    spec = read_spec(tmp_path / "meta")
    assert spec.origin == "meta"
    # Lingua reads the same numbers under other names, and the same tensors.
    fields = {"model": {**params, "max_seqlen": 64}}
    fields["model"] |= {"head_dim": spec.head_dim, "weight_tying": False}
    lingua = LinguaModel.from_params(fields)
    convert(tmp_path / "meta", tmp_path / "meta.pth")
    lingua.load_state_dict(torch_tensors(tmp_path / "meta.pth"))
    assert difference(lingua.eval(), model) < RIGHT

    convert(tmp_path / "meta", tmp_path / "back", form="hf", to="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_rope_frequencies_of_a_release_are_dropped(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "consolidated.00.pth", to="meta")
    state = torch_tensors(tmp_path / "consolidated.00.pth") | {"rope.freqs": torch.ones(8)}
    torch.save(state, tmp_path / "consolidated.00.pth")
    report = convert(tmp_path / "consolidated.00.pth", tmp_path / "back", form="hf", assets=source)
    assert report.source.family == "meta"
    assert report.ignored == (("rope.freqs", keymaps()["meta"].match("rope.freqs").reason),)  # type: ignore[union-attr]
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
