"""Options that mean nothing for a result are said, and a directory that is not there is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import NotACheckpointError
from support.checkpoints.check_cases import llama_shapes, write_hf


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source", llama_shapes())


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("hf", {"chunks": 4}),
        ("torch", {"chunks": 4}),
        ("dcp", {"model_parallel": 2}),
        ("torch", {"max_file_size": 1000}),
        ("hf", {"root": "model"}),
        ("dcp", {"cast_all": True}),
    ],
)
def test_what_has_no_effect_is_said(
    source: Path, tmp_path: Path, form: Any, options: dict[str, Any]
) -> None:
    report = convert(source, tmp_path / "out", form=form, dry_run=True, **options)
    told = [note for note in report.notes if "has no effect" in note]
    assert [note.partition(" ")[0] for note in told] == [*options]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("dcp", {"chunks": 4, "max_file_size": 1000, "root": "model"}),
        ("hf", {"max_file_size": 1000, "cast_all": True, "dtype": "bf16"}),
        ("hf", {"root": ""}),
        ("torch", {"root": "model"}),
    ],
)
def test_what_has_one_is_not(
    source: Path, tmp_path: Path, form: Any, options: dict[str, Any]
) -> None:
    report = convert(source, tmp_path / "out", form=form, dry_run=True, **options)
    assert not [note for note in report.notes if "has no effect" in note]


def test_assets_that_are_not_there_are_refused(source: Path, tmp_path: Path) -> None:
    absent = tmp_path / "nothing"
    with pytest.raises(NotACheckpointError, match="no such directory"):
        convert(source, tmp_path / "out", assets=absent)
    with pytest.raises(NotACheckpointError, match="no such directory"):
        check(source, assets=absent)
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "one.pt")
    with pytest.raises(NotACheckpointError, match="no such directory"):
        load_init_weights(nn.Linear(3, 2), tmp_path / "one.pt", assets=absent)
    assert not (tmp_path / "out").exists()
