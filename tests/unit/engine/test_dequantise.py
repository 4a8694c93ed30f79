"""in_blocks(): the same elements in the same places, few factors at a time."""

from __future__ import annotations

import random

import pytest

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.outline import BlockScale, Part
from dcpconv.engine.dequantise import in_blocks
from support.checkpoints.engine_cases import elements, merged


def scale_of(rows: int, columns: int, block: tuple[int, int]) -> BlockScale:
    down, across = block
    shape = (-(-rows // down), -(-columns // across))
    return BlockScale("m", 50, rows * columns, columns, block, "f", 0, BY_NAME["float32"], shape)


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_every_element_comes_once_with_its_factor(seed: int, itemsize: int) -> None:
    rng = random.Random(seed)
    rows, columns = rng.randint(1, 12), rng.randint(1, 12)
    scale = scale_of(rows, columns, (rng.randint(1, 5), rng.randint(1, 5)))
    row, column = rng.randrange(rows), rng.randrange(columns)
    down, across = rng.randint(1, rows - row), rng.randint(1, columns - column)
    loops = [(down, columns, 1), (across, 1, down)]  # transposed
    if rng.random() < 0.5:
        loops = [(down, columns, across), (across, 1, 1)]
    part = Part("m", 50 + itemsize * (row * columns + column), 9, merged(loops))
    numel, room = rng.randint(1, 40), rng.randint(1, 20)
    found: dict[int, int] = {}
    for cut, (first, count) in in_blocks(part, scale, itemsize=itemsize, numel=numel, room=room):
        assert cut.numel <= numel
        assert count <= room
        for target, offset in elements(cut, itemsize).items():
            assert target not in found
            found[target] = offset
            i, j = divmod((offset - 50) // itemsize, columns)
            block = i // scale.block[0] * scale.factors_shape[1] + j // scale.block[1]
            assert first <= block < first + count
    assert found == elements(part, itemsize)


def test_what_is_small_stays_whole() -> None:
    head = Part("m", 50, 0, ((64, 4096, 8192), (2, 64 * 4096, 4096), (4096, 1, 1)))
    scale = scale_of(4096, 4096, (128, 128))
    assert list(in_blocks(head, scale, itemsize=1, numel=1 << 20, room=32)) == [(head, (0, 32))]
