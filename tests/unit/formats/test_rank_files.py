"""Rank files of FSDP trainers, written by torch itself, read as one model."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from dcpconv import check, convert
from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.formats.ranks import fsdp, fsdp_optimizer
from dcpconv.formats.torchfile import contents, zip_records
from support.checkpoints.rank_files import as_of_torch_2_6, distributed, each_rank, save_verl
from support.checkpoints.stock import assert_same_bits, stock_load
from support.models.hf_models import save_hf, tiny
from support.versions import needs

WEIGHTS = {
    "even.weight": torch.arange(48.0).view(8, 6),
    "odd.weight": torch.arange(35.0).view(7, 5) * 3,
    "one.weight": torch.arange(3.0).view(1, 3) + 100,
    "bias": torch.arange(5.0).bfloat16(),
    "cube": torch.arange(30.0).view(5, 3, 2) - 7,
}
"""Rows that 2, 3 and 4 ranks share evenly, unevenly, and not at all."""


def read_back(directory: Path, target: Path) -> dict[str, Tensor]:
    convert(directory, target, form="dcp")
    return stock_load(target, "dcp")


_uneven = functools.partial(
    pytest.param, marks=needs("torch", "2.13", "_StridedShard of uneven rows")
)


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        pytest.param((1,), [Shard(0)], id="one-rank"),
        pytest.param((2,), [Shard(0)], id="fsdp2"),
        pytest.param((3,), [Shard(0)], id="fsdp2-3"),
        pytest.param((2,), [Replicate()], id="replicated"),
        pytest.param((2, 2), [Replicate(), Shard(0)], id="hsdp"),
        pytest.param((2, 3), [Shard(0), Replicate()], id="shard-replicate"),
        pytest.param((2, 2), [Shard(0), Shard(0)], id="twice"),
        _uneven((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], id="fsdp-tp"),
        _uneven((3, 2), [_StridedShard(0, split_factor=2), Shard(0)], id="fsdp-tp-3"),
        _uneven((2, 4), [_StridedShard(0, split_factor=4), Shard(0)], id="fsdp-tp-4"),
        _uneven((2,), [_StridedShard(0, split_factor=3)], id="strided-alone"),
    ],
)
def test_every_placement_is_put_together(
    tmp_path: Path, shape: tuple[int, ...], placements: list[Placement]
) -> None:
    names = [f"axis{axis}" for axis in range(len(shape))]
    save_verl(tmp_path / "in", distributed(WEIGHTS, placements), shape=shape, names=names)
    assert_same_bits(read_back(tmp_path / "in", tmp_path / "out"), WEIGHTS)


def test_even_rows_that_two_axes_cut_in_turn(tmp_path: Path) -> None:
    weights = {"w": torch.arange(96.0).view(16, 6), "v": torch.arange(8.0)}
    placements = [_StridedShard(0, split_factor=4), Shard(0)]
    save_verl(tmp_path / "in", distributed(weights, placements), shape=(2, 4), names=("dp", "tp"))
    assert_same_bits(read_back(tmp_path / "in", tmp_path / "out"), weights)


def test_columns_and_rows_are_cut_together(tmp_path: Path) -> None:
    weights = {key: WEIGHTS[key] for key in ("even.weight", "odd.weight", "cube")}
    split = distributed(weights, [Shard(0), Shard(1)])
    save_verl(tmp_path / "in", split, shape=(2, 2), names=("dp", "tp"))
    assert_same_bits(read_back(tmp_path / "in", tmp_path / "out"), weights)


def test_what_every_rank_has_comes_once(tmp_path: Path) -> None:
    buffer = {"calls": torch.tensor(7), "table": torch.arange(4.0)}

    def split(mesh: Any) -> dict[str, object]:
        return {
            **distributed(WEIGHTS, [Shard(0)])(mesh),
            **{k: v.clone() for k, v in buffer.items()},
        }

    save_verl(tmp_path / "in", split)
    assert_same_bits(read_back(tmp_path / "in", tmp_path / "out"), {**WEIGHTS, **buffer})
    catalog = open_checkpoint(tmp_path / "in")
    assert len(catalog.tensors["calls"].chunks) == len(catalog.tensors["table"].chunks) == 1


def test_buffers_that_ranks_hold_differently_are_named(tmp_path: Path) -> None:
    def split(mesh: Any) -> dict[str, object]:
        mean = torch.full((3,), float(mesh.get_rank()))
        return {**distributed(WEIGHTS, [Shard(0)])(mesh), "running_mean": mean}

    save_verl(tmp_path / "in", split)
    catalog = open_checkpoint(tmp_path / "in")
    assert any("running_mean: ranks hold other values" in note for note in catalog.notes)


def test_different_models_under_numbered_names_are_not_joined(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for rank in range(2):
        file = tmp_path / "in" / f"model_rank_{rank}.pt"
        torch.save({"w": torch.full((2, 2), float(rank))}, file)
    with pytest.raises(FormatError, match="nothing says how they fit together") as caught:
        open_checkpoint(tmp_path / "in")
    assert ("key", "w") in caught.value.facts


def test_verl_directory_becomes_a_hugging_face_model_and_another_naming(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    weights = stock_load(source, "hf")
    save_verl(tmp_path / "actor", distributed(weights, [Shard(0)]), config=config)
    (tmp_path / "actor" / "huggingface" / "tokenizer.json").write_text("{}")

    convert(tmp_path / "actor", tmp_path / "back", form="hf")
    assert_same_bits(stock_load(tmp_path / "back", "hf"), weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert check(tmp_path / "actor")
    assert check(tmp_path / "actor", against=source)

    convert(tmp_path / "actor", tmp_path / "lingua", to="lingua")
    convert(source, tmp_path / "expected", to="lingua", form="dcp")
    assert_same_bits(
        stock_load(tmp_path / "lingua", "dcp"), stock_load(tmp_path / "expected", "dcp")
    )


@pytest.mark.parametrize("how", [{}, {"engine": "torch"}, {"engine": "torch", "trust": True}])
@pytest.mark.parametrize("name", ["model_world_size_2_rank_0.pt", "in.pt"])
def test_one_rank_is_never_the_model(tmp_path: Path, how: dict[str, Any], name: str) -> None:
    directory = save_verl(tmp_path / "in", distributed(WEIGHTS, [Shard(0)]))
    file = directory / "model_world_size_2_rank_0.pt"
    file.rename(directory / name)
    with pytest.raises(FormatError, match="one rank's share") as caught:
        convert(directory / name, tmp_path / "out", form="dcp", **how)
    assert not (tmp_path / "out").exists()
    hint = str(caught.value.hint)
    assert hint == f"give the directory: {directory}" if "rank" in name else "all 2 ranks" in hint
    with pytest.raises(FormatError, match="one rank's share"):
        check(directory / name)


def test_lost_files_are_named_all_at_once(tmp_path: Path) -> None:
    directory = save_verl(tmp_path / "in", distributed(WEIGHTS, [Shard(0)]), shape=(4,))
    for rank in (1, 3):
        (directory / f"model_world_size_4_rank_{rank}.pt").unlink()
    with pytest.raises(FormatError) as caught:
        convert(directory, tmp_path / "out", form="dcp")
    missing = [value for label, value in caught.value.facts if label == "missing"]
    assert missing == ["model_world_size_4_rank_1.pt", "model_world_size_4_rank_3.pt"]
    report = check(directory)
    assert not report
    assert report.problems == tuple(f"{name} is missing" for name in missing)


def test_a_lost_file_shows_where_names_do_not_say_how_many_there_are(tmp_path: Path) -> None:
    directory = save_verl(tmp_path / "in", distributed(WEIGHTS, [Shard(0)]), shape=(3,))
    for rank in range(2):
        file = directory / f"model_world_size_3_rank_{rank}.pt"
        file.rename(directory / f"pytorch_model_fsdp_0_rank_{rank}.bin")
    (directory / "model_world_size_3_rank_2.pt").unlink()
    with pytest.raises(FormatError) as caught:
        open_checkpoint(directory)
    assert ("missing", "pytorch_model_fsdp_0_rank_2.bin") in caught.value.facts


def test_truncated_file_is_named(tmp_path: Path) -> None:
    directory = save_verl(tmp_path / "in", distributed(WEIGHTS, [Shard(0)]))
    file = directory / "model_world_size_2_rank_1.pt"
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(FormatError) as caught:
        open_checkpoint(directory)
    assert "model_world_size_2_rank_1.pt" in str(caught.value)
    assert any("model_world_size_2_rank_1.pt" in problem for problem in check(directory).problems)


def _two_saves(directory: Path) -> None:
    save_verl(directory, distributed(WEIGHTS, [Shard(0)]))
    save_verl(directory, distributed(WEIGHTS, [Shard(0)]), shape=(3,))


def _config_of_another(directory: Path) -> None:
    save_verl(directory, distributed(WEIGHTS, [Shard(0)]))
    (directory / "fsdp_config.json").write_text('{"world_size": 8}')


def _renamed_to_a_smaller_world(directory: Path) -> None:
    save_verl(directory, distributed(WEIGHTS, [Shard(0)]), shape=(3,))
    (directory / "fsdp_config.json").unlink()
    for rank in range(2):
        name = f"model_world_size_3_rank_{rank}.pt"
        (directory / name).rename(directory / name.replace("3", "2", 1))
    (directory / "model_world_size_3_rank_2.pt").unlink()


def _a_rank_beyond(directory: Path) -> None:
    save_verl(directory, distributed(WEIGHTS, [Shard(0)]))
    shutil.copy(
        directory / "model_world_size_2_rank_1.pt", directory / "model_world_size_2_rank_2.pt"
    )


def _swapped(directory: Path) -> None:
    save_verl(directory, distributed(WEIGHTS, [Shard(0)]))
    _swap(directory)


def _swap(directory: Path) -> None:
    one, two = (directory / f"model_world_size_2_rank_{rank}.pt" for rank in range(2))
    one.rename(directory / "aside")
    two.rename(one)
    (directory / "aside").rename(two)


def _swapped_by_torch_2_6(directory: Path) -> None:
    """Alike in everything but what they hold."""

    def split(mesh: Any) -> dict[str, object]:
        pieces = distributed({"w": torch.arange(48.0).view(8, 6)}, [Shard(0)])(mesh)
        as_of_torch_2_6(mesh)
        return dict(pieces)

    save_verl(directory, split)
    _swap(directory)


def _other_sizes(directory: Path) -> None:
    save_verl(directory, distributed(WEIGHTS, [Shard(0)]))
    other = {key: torch.cat([value, value]) for key, value in WEIGHTS.items()}
    save_verl(directory.parent / "other", distributed(other, [Shard(0)]))
    name = "model_world_size_2_rank_1.pt"
    (directory.parent / "other" / name).replace(directory / name)


def _sums(directory: Path) -> None:
    save_verl(directory, distributed(WEIGHTS, [Partial()]))


@pytest.mark.parametrize(
    ("write", "names"),
    [
        pytest.param(_two_saves, "model_world_size_3_rank_0.pt", id="two-saves"),
        pytest.param(_config_of_another, "world_size 8", id="config"),
        pytest.param(_renamed_to_a_smaller_world, "saved by 3 ranks", id="smaller-world"),
        pytest.param(_a_rank_beyond, "model_world_size_2_rank_2.pt", id="beyond"),
        pytest.param(_swapped, "model_world_size_2_rank_0.pt holds the share of rank 1", id="swap"),
        pytest.param(
            _swapped_by_torch_2_6,
            "model_world_size_2_rank_0.pt holds the share of rank 1",
            id="swap-2.6",
        ),
        pytest.param(_other_sizes, "odd.weight is of shape [7, 5]", id="sizes"),
        pytest.param(_sums, "a term of a sum", id="partial"),
    ],
)
def test_files_that_are_not_of_one_save_are_refused(tmp_path: Path, write: Any, names: str) -> None:
    write(tmp_path / "in")
    with pytest.raises(DcpconvError) as caught:
        convert(tmp_path / "in", tmp_path / "out", form="dcp")
    assert names in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_lost_row_of_ranks_names_the_gap(tmp_path: Path) -> None:
    """Names and number of the files are right, what is in one is not."""
    directory = save_verl(tmp_path / "in", distributed(WEIGHTS, [Shard(0)]))
    shutil.copy(
        directory / "model_world_size_2_rank_0.pt", directory / "model_world_size_2_rank_1.pt"
    )
    with pytest.raises(FormatError):
        open_checkpoint(directory)


def test_a_name_twice_comes_tied(tmp_path: Path) -> None:
    def split(mesh: Any) -> dict[str, object]:
        state = distributed(WEIGHTS, [Shard(0)])(mesh)
        return {**state, "again.weight": state["odd.weight"]}

    catalog = open_checkpoint(save_verl(tmp_path / "in", split))
    assert catalog.tied == {"again.weight": "odd.weight"}


def test_every_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_verl(tmp_path / "in", distributed(WEIGHTS, [Shard(0)]), shape=(16,))
    opened: list[str] = []
    real = zip_records.read_archive

    def counting(read: Any, nbytes: int, where: str, **options: Any) -> Any:
        opened.append(where)
        return real(read, nbytes, where, **options)

    monkeypatch.setattr(contents, "read_archive", counting)
    fsdp.read_catalog(directory)
    assert sorted(opened) == sorted(str(file) for file in directory.glob("model_*.pt"))


def test_other_names_of_trainers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    split = distributed(WEIGHTS, [Shard(0)])
    for rank, mesh in each_rank((2,), ("fsdp",)):
        torch.save(split(mesh), tmp_path / "in" / f"pytorch_model_fsdp_rank{rank}.bin")
        torch.save({"state": {}}, tmp_path / "in" / f"optimizer_rank{rank}.bin")
    assert_same_bits(read_back(tmp_path / "in", tmp_path / "out"), WEIGHTS)


def test_the_directory_above_is_answered_with_the_one_to_give(tmp_path: Path) -> None:
    save_verl(tmp_path / "step" / "actor", distributed(WEIGHTS, [Shard(0)]))
    with pytest.raises(DcpconvError) as caught:
        open_checkpoint(tmp_path / "step")
    assert str(tmp_path / "step" / "actor") in str(caught.value.hint)


def _with_optimizer(directory: Path, shapes: list[tuple[int, ...]]) -> Path:
    """Rank files of a model of four matrices, and an optimizer of so many numbers."""
    weights = {f"{name}.weight": torch.randn(8, 4) for name in "ac"}
    weights |= {f"{name}.weight": torch.randn(4, 4) for name in "bd"}
    weights = {key: weights[key] for key in sorted(weights)}
    save_verl(directory, distributed(weights, [Shard(0)]))
    whole = {number: torch.randn(shape) for number, shape in enumerate(shapes)}
    for rank, mesh in each_rank((2,), ("fsdp",)):
        split = distributed({str(n): value for n, value in whole.items()}, [Shard(0)])(mesh)
        state = {number: {"exp_avg": split[str(number)]} for number in whole}
        groups = [{"lr": 0.1, "params": [*whole]}]
        path = directory / f"optim_world_size_2_rank_{rank}.pt"
        torch.save({"state": state, "param_groups": groups}, path)
    return directory


SOME = [
    pytest.param([(8, 4), (4, 4), (8, 4)], ["a", "b", "c"], id="last-frozen"),
    pytest.param([(4, 4), (8, 4), (4, 4)], ["b", "c", "d"], id="first-frozen"),
    pytest.param([(8, 4), (4, 4), (8, 4), (4, 4)], ["a", "b", "c", "d"], id="none-frozen"),
]


@pytest.mark.parametrize(("shapes", "names"), SOME)
def test_numbers_are_of_the_trained_parameters(
    shapes: list[tuple[int, ...]], names: list[str], tmp_path: Path
) -> None:
    catalog = fsdp_optimizer.read_training(_with_optimizer(tmp_path / "in", shapes))

    expected = [f"{name}.weight" for name in names]
    assert catalog.objects["optimizer.param_groups.0.params"] == expected
    found = [key for key in catalog.tensors if key.startswith("optimizer.")]
    assert found == [f"optimizer.state.{name}.exp_avg" for name in expected]


def test_a_choice_of_trained_parameters_is_an_error_that_lists_it(tmp_path: Path) -> None:
    directory = _with_optimizer(tmp_path / "in", [(8, 4), (4, 4)])
    with pytest.raises(FormatError, match="several parameters") as caught:
        fsdp_optimizer.read_training(directory)
    assert [fact for fact in caught.value.facts if fact[0] == "ambiguous"] == [
        ("ambiguous", "0 is a.weight or c.weight"),
        ("ambiguous", "1 is b.weight or d.weight"),
    ]
