"""Every form to every form, through every naming: A -> B -> A is the identity on bits."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from dcpconv import convert
from dcpconv.core.catalog import Form
from support.checkpoints.stock import assert_same_bits, stock_load
from support.models.hf_models import save_hf, tiny

FORMS: tuple[Form, ...] = ("hf", "torch", "dcp")
FAMILIES = [
    pytest.param("hf", "hf", id="hf-hf"),
    pytest.param("hf", "lingua", id="hf-lingua"),
    pytest.param("hf", "meta", id="hf-meta"),
    pytest.param("lingua", "meta", id="lingua-meta"),
    pytest.param("lingua", "lingua", id="lingua-lingua"),
    pytest.param("meta", "hf", id="meta-hf"),
]


@pytest.mark.parametrize(("own", "other"), FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_there_and_back_is_the_identity(
    tmp_path: Path, own: str, other: str, dtype: torch.dtype, *, tied: bool, sharded: bool
) -> None:
    model = tiny("llama", dtype=dtype, tie_word_embeddings=tied, num_hidden_layers=2)
    hf = save_hf(model, tmp_path / "origin", max_shard_size="90KB" if sharded else None)
    size = 90_000 if sharded else None
    chunks = 3 if sharded else 1

    def run(source: Path, target: Path, form: Form, to: str) -> dict[str, torch.Tensor]:
        convert(
            source,
            target,
            form=form,
            to=to,
            assets=hf,
            chunks=chunks,
            max_file_size=size,
        )
        return stock_load(target, form)

    for first, second in product(FORMS, FORMS):
        place = tmp_path / f"{first}-{second}"
        start = run(hf, place / "a", first, own)
        there = run(place / "a", place / "b", second, other)
        back = run(place / "b", place / "c", first, own)
        assert_same_bits(back, start)
        assert len(there) >= len(model.state_dict()) - int(tied)


def test_hf_files_of_the_matrix_hold_what_the_model_holds(tmp_path: Path) -> None:
    model = tiny("llama")
    hf = save_hf(model, tmp_path / "hf")

    convert(hf, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "back", assets=hf)

    assert_same_bits(stock_load(tmp_path / "back", "hf"), model.state_dict())
