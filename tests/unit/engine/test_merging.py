"""The change of a box: the same bits from every region, tile and layout of the stored matrix."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dcpconv.core.catalog import Lane, TensorEntry, Update
from dcpconv.core.dtypes import BY_NAME
from dcpconv.engine.dequantise import Computed
from dcpconv.engine.grids import AREA, grids
from dcpconv.engine.tensors import memory
from dcpconv.formats.safetensors import read_catalog
from dcpconv.plan.coverage import as_stored
from dcpconv.plan.fills import fill_of
from dcpconv.stores.local import Sources

ROWS, COLUMNS, RANK = 83, 1100, 5

KINDS = (
    *("plain", "magnitudes", "some rows", "some columns"),
    *("given", "given in another order"),
)


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, TensorEntry]:
    generator = torch.Generator().manual_seed(2)
    made = {
        "w": torch.randn(ROWS, COLUMNS, generator=generator).bfloat16(),
        "a": torch.randn(RANK, COLUMNS, generator=generator),
        "b": torch.randn(ROWS, RANK, generator=generator),
        "m": torch.rand(ROWS, generator=generator) + 0.5,
        "given": torch.randn(ROWS, COLUMNS, generator=generator),
    }
    save_file(made, tmp_path / "model.safetensors")
    return dict(read_catalog(tmp_path / "model.safetensors").tensors)


def read(entry: TensorEntry, directory: Path, offsets: Any, sizes: Any, tile: int = 0) -> Tensor:
    """A region of a tensor as it is computed, whole or in tiles of so many elements."""
    fill = fill_of(as_stored("w", entry), offsets, sizes, dtype=BY_NAME["float32"])
    box, made = Computed(fill), torch.zeros(sizes)
    view = memory(made)
    with Sources(directory) as sources:
        for start in range(0, fill.numel, tile or fill.numel):
            stop = min(fill.numel, start + (tile or fill.numel))
            box.read(start, stop, sources=sources, into=view[start * 4 : stop * 4])
    return made


def updates(stored: dict[str, TensorEntry]) -> dict[str, Update]:
    plain = Update(scale=0.75, left=stored["b"], right=stored["a"])
    return {
        "plain": plain,
        "magnitudes": replace(plain, magnitude=stored["m"]),
        "some rows": replace(plain, rows=Lane(3, 0, ((40, 2, 1),))),
        "some columns": replace(plain, columns=Lane(0, 100, ((500, 2, 2),))),
        "given": Update(given=stored["given"]),
        "given in another order": Update(given=stored["given"], rows=Lane(0, 82, ((83, 1, -1),))),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_has_the_bits_of_the_whole(
    kind: str, stored: dict[str, TensorEntry], tmp_path: Path
) -> None:
    entry = replace(stored["w"], updates=(updates(stored)[kind],))
    whole = read(entry, tmp_path, (0, 0), (ROWS, COLUMNS))
    rng = random.Random(kind)
    for _ in range(12):
        offsets = rng.randrange(ROWS), rng.randrange(COLUMNS)
        sizes = rng.randint(1, ROWS - offsets[0]), rng.randint(1, COLUMNS - offsets[1])
        part = read(entry, tmp_path, offsets, sizes, rng.choice([0, 777, 5001]))
        wanted = whole[offsets[0] :, offsets[1] :][: sizes[0], : sizes[1]]
        assert torch.equal(part, wanted), (offsets, sizes)


def test_lanes_say_which_rows_are_changed(stored: dict[str, TensorEntry], tmp_path: Path) -> None:
    plain = stored["w"]
    made = {
        kind: read(replace(plain, updates=(update,)), tmp_path, (0, 0), (ROWS, COLUMNS))
        for kind, update in updates(stored).items()
    }
    with Sources(tmp_path) as sources:
        from dcpconv.engine.rows import read_rows

        w, a, b, given = (
            read_rows(stored[key], 0, stored[key].shape[0], sources, torch.float32)
            for key in ("w", "a", "b", "given")
        )
    change = (b @ a) * 0.75
    some = torch.zeros_like(w)
    some[3:83:2] = change[:40]
    torch.testing.assert_close(made["some rows"], w + some)
    some = torch.zeros_like(w)
    some[:, :1000:2] = change[:, 100:1100:2]
    torch.testing.assert_close(made["some columns"], w + some)
    assert torch.equal(made["given in another order"], given.flip(0))


@pytest.mark.parametrize("seed", range(40))
def test_grids_cover_every_element_once(seed: int) -> None:
    rng = random.Random(seed)
    width = rng.choice([1, 4, 6, 7, 12])
    loops, target = [], 1
    for _ in range(rng.randint(0, 3)):
        count = rng.randint(2, 5)
        loops.append((count, rng.choice([1, 2, 3, width, 2 * width, 5]), target))
        target *= count
    first = rng.randrange(20)
    wanted = {0: first}
    for count, step, to in loops:
        wanted = {t + n * to: s + n * step for t, s in wanted.items() for n in range(count)}
    found: dict[int, int] = {}
    for grid in grids(first, 0, tuple(reversed(loops)), width):
        assert grid.height * grid.width <= AREA
        assert grid.column + grid.width <= width
        places = {grid.target: (grid.row, grid.column)}
        for moves, (down, across) in ((grid.down, (1, 0)), (grid.across, (0, 1))):
            for count, step, to in moves:
                places = {
                    t + n * to: (row + n * step * down, column + n * step * across)
                    for t, (row, column) in places.items()
                    for n in range(count)
                }
        assert not found.keys() & places.keys()
        found |= {t: row * width + column for t, (row, column) in places.items()}
    assert found == wanted
