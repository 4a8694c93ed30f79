"""Model-parallel releases in several files: merged, split, and refused when they do not belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpconv import convert
from dcpconv.core.errors import CoverageError, FormatError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.formats.torchfile import meta_ranks as metashards
from support.checkpoints.families import assert_same, hf_tensors, torch_tensors
from support.models.hf_models import save_hf, tiny

COLUMNS = ("wo.weight", "w2.weight")


def shares(state: dict[str, Tensor], ranks: int, *, by_vocabulary: bool) -> list[dict[str, Tensor]]:
    """What each rank of fairscale's model-parallel layers saves."""
    made: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for key, tensor in state.items():
        is_embedding = key.startswith("tok_embeddings")
        dim = 1 if key.endswith(COLUMNS) or (is_embedding and not by_vocabulary) else 0
        parts = tensor.chunk(ranks, dim) if tensor.dim() > 1 else (tensor,) * ranks
        for rank, part in enumerate(parts):
            made[rank][key] = part.clone()
    return made


def release(directory: Path, *, ranks: int = 2, theta: float = 1e4, **overrides: Any) -> Path:
    """A tiny Llama as Hugging Face has it, and its shares in ``meta``."""
    model = tiny(
        "llama",
        vocab_size=132,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        **overrides,
    )
    source = save_hf(model, directory / "hf")
    convert(source, directory / "whole.pth", to="meta")
    (directory / "meta").mkdir()
    state = torch_tensors(directory / "whole.pth")
    each = shares(state, ranks, by_vocabulary=theta >= 5e5)
    for rank, share in enumerate(each):
        torch.save(share, directory / "meta" / f"consolidated.{rank:02d}.pth")
    return source


@pytest.mark.parametrize(
    ("theta", "overrides"),
    [
        pytest.param(1e4, {}, id="llama2"),
        pytest.param(5e5, {}, id="llama3"),
        pytest.param(5e5, {"tie_word_embeddings": True}, id="tied"),
        pytest.param(1e4, {"num_hidden_layers": 11}, id="eleven-layers"),
    ],
)
def test_files_are_merged_and_split_bit_for_bit(
    tmp_path: Path, theta: float, overrides: dict[str, Any]
) -> None:
    source = release(tmp_path, theta=theta, **overrides)
    report = convert(tmp_path / "meta", tmp_path / "hf2", form="hf", to="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "hf2"), hf_tensors(source))
    assert any("2 model-parallel files" in note for note in report.notes)

    convert(source, tmp_path / "split", form="torch", to="meta", model_parallel=2)
    names = sorted(path.name for path in (tmp_path / "split").iterdir())
    assert names == ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    for name in names[:2]:
        found = torch_tensors(tmp_path / "split" / name)
        assert_same(found, torch_tensors(tmp_path / "meta" / name))


def test_what_was_split_is_cast_on_the_way(tmp_path: Path) -> None:
    source = release(tmp_path)
    convert(source, tmp_path / "split", form="torch", to="meta", model_parallel=2, dtype="bf16")
    found = torch_tensors(tmp_path / "split" / "consolidated.01.pth")
    whole = torch_tensors(tmp_path / "whole.pth")["layers.1.attention.wo.weight"]
    assert torch.equal(found["layers.1.attention.wo.weight"], whole[:, 48:].bfloat16())


def test_a_dim_that_does_not_divide_is_told(tmp_path: Path) -> None:
    source = release(tmp_path)
    with pytest.raises(FormatError, match="7 equal parts") as raised:
        convert(source, tmp_path / "split", form="torch", to="meta", model_parallel=7)
    assert ("norm.weight", "[96]") not in raised.value.facts
    assert ("layers.0.attention.wq.weight", "[96, 96] along dim 0") in raised.value.facts
    assert not (tmp_path / "split").exists()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    release(tmp_path, ranks=4)
    (tmp_path / "meta" / "consolidated.01.pth").unlink()
    with pytest.raises(FormatError, match="lacks files") as raised:
        open_checkpoint(tmp_path / "meta")
    assert ("missing", "consolidated.01.pth") in raised.value.facts


def test_files_of_two_models_are_refused(tmp_path: Path) -> None:
    release(tmp_path)
    path = tmp_path / "meta" / "consolidated.01.pth"
    state = torch_tensors(path)
    torch.save({**state, "norm.weight": torch.ones(7)}, path)
    with pytest.raises(FormatError, match="not shares of one model") as raised:
        open_checkpoint(tmp_path / "meta")
    assert ("consolidated.01.pth", "differs from consolidated.00.pth in norm.weight") in (
        raised.value.facts
    )


def test_a_matrix_without_a_rule_is_refused(tmp_path: Path) -> None:
    release(tmp_path)
    for path in (tmp_path / "meta").iterdir():
        torch.save({**torch_tensors(path), "layers.0.novel.weight": torch.ones(4, 4)}, path)
    with pytest.raises(FormatError, match="no rule"):
        open_checkpoint(tmp_path / "meta")


def test_a_single_file_is_no_split_release(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    assert not metashards.is_split(tmp_path)
    assert open_checkpoint(tmp_path).tensors.keys() == {"a"}


def test_one_share_of_several_points_to_the_directory(tmp_path: Path) -> None:
    source = release(tmp_path)
    share = tmp_path / "meta" / "consolidated.00.pth"
    with pytest.raises(CoverageError) as raised:
        convert(share, tmp_path / "out", form="hf", to="hf", assets=source)
    assert raised.value.hint is not None
    assert "give its directory" in raised.value.hint
