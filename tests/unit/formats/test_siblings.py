"""A file whose pickle is known is read as it is read alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from dcpconv.core.catalog import Identity
from dcpconv.core.errors import FormatError
from dcpconv.formats.ranks import siblings
from dcpconv.formats.ranks.siblings import Siblings
from dcpconv.formats.torchfile.archive import Archive
from dcpconv.formats.torchfile.contents import Contents, leaves_in, read_leaves
from support.checkpoints.rank_files import as_of_torch_2_6, each_rank
from support.versions import placed

MESHES = {
    "line": ((3,), ("fsdp",), (Shard(0),)),
    "square": ((2, 8), ("dp", "tp"), (Replicate(), Shard(1))),
    "wide": ((300,), ("fsdp",), (Shard(0),)),  # numbers of one byte and of two
}


def save(
    directory: Path,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    by: tuple[Placement, ...],
    *,
    is_older: bool,
) -> list[Path]:
    """Rows that some ranks share unevenly, a tensor that all hold, and a second name."""
    paths = []
    for rank, mesh in each_rank(shape, names):
        if rank not in {0, 1, 2, 3, 8, 9, 10, 200, 298, 299}:
            continue
        path = directory / f"model_rank_{rank}.pt"
        torch.save(state(mesh, by, is_older=is_older), path)
        paths.append(path)
    return paths


def state(mesh: DeviceMesh, by: tuple[Placement, ...], *, is_older: bool) -> Mapping[str, object]:
    first = placed(torch.randn(7, 6), mesh, by)
    second = placed(torch.randn(600, 4), mesh, by)
    vars(mesh)["_hash"] = (1 << 62) + mesh.get_rank()  # differs from process to process
    if is_older:
        as_of_torch_2_6(mesh)
    return {
        "first": first,
        "again": first,
        "second": second,
        "plain": torch.randn(3),
        "step": 7,
    }


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read by themselves."""
    read: list[Path] = []

    def reading(archive: Archive, identity: Identity) -> Contents:
        read.append(Path(archive.where))
        return leaves_in(archive, identity)

    monkeypatch.setattr(siblings, "leaves_in", reading)
    return read


@pytest.mark.parametrize("is_older", [False, True], ids=["installed", "2.6"])
@pytest.mark.parametrize("name", MESHES)
def test_every_file_is_read_as_alone(
    name: str, *, is_older: bool, tmp_path: Path, alone: list[Path]
) -> None:
    paths = save(tmp_path, *MESHES[name], is_older=is_older)
    reader = Siblings()
    for path in (*paths, *reversed(paths)):
        assert reader.read(path) == read_leaves(path)
    assert len(alone) == len(set(alone)) < len(paths)


def test_a_file_that_differs_is_read_by_itself(tmp_path: Path, alone: list[Path]) -> None:
    one, two, other = tmp_path / "one.pt", tmp_path / "two.pt", tmp_path / "other.pt"
    torch.save({"a": torch.zeros(3), "step": 1}, one)
    torch.save({"a": torch.ones(3), "step": 1}, two)
    torch.save({"a": torch.ones(3), "step": 2}, other)
    reader = Siblings()
    for path in (one, two, other):
        assert reader.read(path) == read_leaves(path)
    assert alone == [one, other]


def test_records_of_another_length_are_not_taken_for_the_same(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    torch.save({"a": torch.zeros(3000)}, one)
    data = bytearray(one.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    data[entry + 20 : entry + 28] = (8).to_bytes(4, "little") * 2  # both sizes of the record
    two.write_bytes(data)
    reader = Siblings()
    reader.read(one)
    with pytest.raises(FormatError, match="does not fit its record"):
        reader.read(two)


def test_a_file_cut_short_is_an_error_that_names_it(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    torch.save({"a": torch.zeros(3000)}, one)
    two.write_bytes(one.read_bytes()[:-2000])
    reader = Siblings()
    reader.read(one)
    with pytest.raises(FormatError) as caught:
        reader.read(two)
    assert str(two) in str(caught.value)
