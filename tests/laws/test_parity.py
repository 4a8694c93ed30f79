"""Our engine against torch's own converters: equal tensors, keys, nesting and objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import convert, dcp_to_torch_save, torch_save_to_dcp
from dcpconv.core.errors import DcpconvError
from support.checkpoints.states import (
    ENGINES,
    State,
    assert_same,
    every_dtype,
    flat,
    lists_of_tensors,
    loaded,
    odd_shapes,
    random,
    strided,
    tied,
    training,
)
from support.checkpoints.stock import nested_of_dcp

CASES = [
    pytest.param(case, id=case.__name__)
    for case in (flat, training, every_dtype, odd_shapes, strided, tied, lists_of_tensors)
]


def metadata(path: Path) -> tuple[object, ...]:
    """What ``.metadata`` says about every key, without where the bytes lie."""
    read = FileSystemReader(path).read_metadata()
    return (
        {key: (type(value), getattr(value, "size", None)) for key, value in listed(read).items()},
        read.planner_data,
    )


def listed(read: Metadata) -> dict[str, object]:
    return dict(sorted(read.state_dict_metadata.items()))


@pytest.mark.parametrize("case", CASES)
def test_a_torch_file_becomes_the_same_dcp(tmp_path: Path, case: Callable[[], State]) -> None:
    torch.save(case(), tmp_path / "x.pth")

    format_utils.torch_save_to_dcp(tmp_path / "x.pth", tmp_path / "torch")
    torch_save_to_dcp(tmp_path / "x.pth", tmp_path / "drop-in")
    for engine in ENGINES:
        convert(tmp_path / "x.pth", tmp_path / f"by-{engine}", engine=engine, form="dcp")

    expected = nested_of_dcp(tmp_path / "torch")
    for name in ("drop-in", "by-stream", "by-torch"):
        assert_same(nested_of_dcp(tmp_path / name), expected)
        assert metadata(tmp_path / name) == metadata(tmp_path / "torch")


@pytest.mark.parametrize("case", CASES)
def test_a_dcp_becomes_the_same_torch_file(tmp_path: Path, case: Callable[[], State]) -> None:
    save(case(), checkpoint_id=tmp_path / "dcp")

    format_utils.dcp_to_torch_save(tmp_path / "dcp", tmp_path / "torch.pth")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "drop-in.pth")
    for engine in ENGINES:
        convert(tmp_path / "dcp", tmp_path / f"by-{engine}.pth", engine=engine)

    expected = loaded(tmp_path / "torch.pth")
    for name in ("drop-in", "by-stream", "by-torch"):
        assert_same(loaded(tmp_path / f"{name}.pth"), expected)


def test_a_flat_dcp_stays_flat(tmp_path: Path) -> None:
    state = {"model.a.weight": random(3, 2), "model.b": random(2)}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    save(state, checkpoint_id=tmp_path / "dcp", planner=planner)

    for engine in ENGINES:
        convert(tmp_path / "dcp", tmp_path / f"{engine}.pth", engine=engine)
        assert_same(loaded(tmp_path / f"{engine}.pth"), state)


def test_tied_tensors_stay_one_where_torch_stores_two(tmp_path: Path) -> None:
    torch.save(tied(), tmp_path / "x.pth")

    torch_save_to_dcp(tmp_path / "x.pth", tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "y.pth")

    items = FileSystemReader(tmp_path / "dcp").read_metadata().storage_data
    offsets = {index.fqn: item.offset for index, item in items.items()}
    assert offsets["embed.weight"] == offsets["head.weight"]
    back = loaded(tmp_path / "y.pth")
    assert back["embed.weight"].data_ptr() == back["head.weight"].data_ptr()


def test_drop_ins_replace_what_is_there_and_make_directories(tmp_path: Path) -> None:
    torch.save(flat(), tmp_path / "x.pth")
    step = tmp_path / "dump/checkpoints/0000000001"
    step.mkdir(parents=True)
    (step / "params.json").write_text("{}")
    (step / "old").mkdir()
    (step / "old/notes.txt").write_text("mine")
    (step / "link").symlink_to("params.json")
    save({"stale": random(4)}, checkpoint_id=step)
    (step / "__1_0.distcp").write_bytes(b"of a rank that is gone")

    torch_save_to_dcp(tmp_path / "x.pth", str(step))
    dcp_to_torch_save(str(step), tmp_path / "deep/down/y.pth")
    dcp_to_torch_save(step, tmp_path / "deep/down/y.pth")

    assert_same(loaded(tmp_path / "deep/down/y.pth"), flat())
    names = {".metadata", "__0_0.distcp", "params.json", "old", "link"}
    assert {path.name for path in step.iterdir()} == names
    assert (step / "old/notes.txt").read_text() == "mine"
    assert (step / "link").is_symlink()


def test_a_drop_in_never_replaces_the_directory_it_reads_from(tmp_path: Path) -> None:
    (tmp_path / "step/consolidated").mkdir(parents=True)
    torch.save(flat(), tmp_path / "step/consolidated/consolidated.pth")

    with pytest.raises(DcpconvError, match="cannot be written"):
        torch_save_to_dcp(tmp_path / "step/consolidated/consolidated.pth", tmp_path / "step")

    assert (tmp_path / "step/consolidated/consolidated.pth").exists()
