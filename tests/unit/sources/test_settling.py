"""What the user says of a conversion's naming, and what no one can be asked to give up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpconv import convert
from dcpconv.core.errors import DcpconvError
from dcpconv.sources.said import parse_allowed
from support.checkpoints.families import assert_same, hf_tensors
from support.models.hf_models import save_hf, tiny


def test_several_features_may_stand_in_one_text() -> None:
    assert parse_allowed("rope_scaling, qkv_bias") == ("rope_scaling", "qkv_bias")
    assert parse_allowed(["rope_scaling,qkv_bias", "overflow"]) == (
        *("rope_scaling", "qkv_bias", "overflow"),
    )


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param("rope_scalling", "unknown", id="misspelt"),
        pytest.param("head_dim", "fixed", id="shape"),
        pytest.param("untied", "fixed", id="tie"),
    ],
)
def test_a_name_that_leaves_nothing_out_is_an_error(tmp_path: Path, name: str, label: str) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    with pytest.raises(DcpconvError, match="not everything") as raised:
        convert(source, tmp_path / "out", to="lingua", allow=[name])
    assert any(fact == label for fact, _ in raised.value.facts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["dcp", "torch"])
def test_a_tie_finds_back_from_a_release_that_has_no_word_for_it(tmp_path: Path, form: str) -> None:
    source = save_hf(tiny("llama", tie_word_embeddings=True), tmp_path / "hf")
    target = tmp_path / ("meta" if form == "dcp" else "consolidated.00.pth")
    convert(source, target, to="meta")
    assets = None if form == "dcp" else source
    convert(target, tmp_path / "back", form="hf", to="hf", assets=assets)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_what_is_not_tied_in_meta_stays_apart(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "meta", to="meta")
    convert(tmp_path / "meta", tmp_path / "back", to="hf")
    found = hf_tensors(tmp_path / "back")
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
