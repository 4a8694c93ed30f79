"""What a result will not take from the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.outline import Fill, OutFile, Outline, Part
from dcpconv.engine.space import spared
from dcpconv.stores.system import System

U8 = BY_NAME["uint8"]


def result(*, source: int, target: int, nbytes: int, loops: int = 1) -> Outline:
    """One payload: a run from ``source`` to ``target``, or rows that are not one run."""
    nest = ((nbytes, 1, 1),) if loops == 1 else ((loops, 2, 1), (nbytes // loops, 1, 1))
    fill = Fill(U8, U8, nbytes, (Part("s", source, 0, nest),))
    return Outline((OutFile("t", target + nbytes, (), ((target, fill),)),))


def clone(*_: int) -> None:
    """Every file system shares blocks."""


def refuse(*_: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "not supported")


@pytest.fixture
def block(tmp_path: Path) -> int:
    return os.statvfs(tmp_path).f_bsize


def write(tmp_path: Path, nbytes: int) -> None:
    (tmp_path / "s").write_bytes(b"x" * nbytes)


@pytest.mark.parametrize(
    ("source", "target", "loops", "blocks"),
    [
        pytest.param(0, 0, 1, 4, id="aligned"),
        pytest.param(100, 100, 1, 3, id="alike but unaligned"),
        pytest.param(100, 101, 1, 0, id="not alike"),
        pytest.param(0, 0, 2, 0, id="relabelled"),
    ],
)
def test_shared_blocks_are_the_whole_ones_of_runs_that_lie_alike(
    tmp_path: Path, block: int, source: int, target: int, loops: int, blocks: int
) -> None:
    write(tmp_path, 8 * block)
    outline = result(source=source, target=target, nbytes=4 * block, loops=loops)

    found = spared(outline, source=tmp_path, stage=tmp_path, system=System(clone=clone))

    assert found == blocks * block
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_without_shared_blocks_only_holes_are_spared(tmp_path: Path, block: int) -> None:
    write(tmp_path, block)
    os.truncate(tmp_path / "s", 101 * block)
    outline = result(source=0, target=0, nbytes=101 * block)

    found = spared(outline, source=tmp_path, stage=tmp_path, system=System(clone=refuse))

    assert found == 100 * block


def test_a_dense_source_spares_nothing(tmp_path: Path, block: int) -> None:
    write(tmp_path, 3 * block)
    outline = result(source=0, target=0, nbytes=3 * block)

    assert spared(outline, source=tmp_path, stage=tmp_path, system=System(clone=refuse)) == 0
