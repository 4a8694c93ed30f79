"""Parts of a plan that follow each other on both sides are one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dcpconv import open_checkpoint
from dcpconv.core.outline import Part
from dcpconv.plan.coverage import as_stored
from dcpconv.plan.fills import fill_of
from support.checkpoints.dcp_directories import read_tensor
from support.checkpoints.zero_files import Run, write_zero

WEIGHT = torch.arange(7 * 5 * 3, dtype=torch.float32).reshape(7, 5, 3)


def follows(one: Part, other: Part) -> bool:
    return one.file == other.file and one.offset + one.numel * 4 == other.offset


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_what_a_rank_held_is_one_part(stage: int, ranks: int, tmp_path: Path) -> None:
    at = write_zero(tmp_path, Run(groups=[{"w": WEIGHT}], ranks=ranks, stage=stage))
    catalog = open_checkpoint(at)
    entry = catalog.tensors["w"]

    fill = fill_of(as_stored("w", entry), (0, 0, 0), (7, 5, 3))

    assert torch.equal(read_tensor(catalog, "w"), WEIGHT)
    assert len(fill.parts) == len({part.file for part in fill.parts}) == ranks
    assert len(entry.chunks) >= ranks
    assert not any(follows(one, other) for one, other in pairwise(fill.parts))
    read = []
    for part in fill.parts:
        with (at / part.file).open("rb") as file:
            file.seek(part.offset)
            read.append(file.read(part.numel * 4))
    assert b"".join(read) == WEIGHT.numpy().tobytes()
