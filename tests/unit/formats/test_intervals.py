"""boxes_of() and chunks_of() against the one implementation nobody doubts: torch slicing."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dcpconv.formats.ranks.intervals import Segment, boxes_of, chunks_of

SHAPES = [
    pytest.param((), id="0-d"),
    pytest.param((7,), id="vector"),
    pytest.param((4, 6), id="matrix"),
    pytest.param((5, 1), id="column"),
    pytest.param((2, 3, 4), id="experts"),
    pytest.param((3, 1, 2, 5), id="4-d"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_hold_the_interval_in_order(shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    tensor = torch.arange(numel).reshape(shape)
    for start, stop in itertools.combinations(range(numel + 1), 2):
        boxes = [*boxes_of(shape, start, stop)]
        parts = [
            tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten()
            for box in boxes
        ]
        assert torch.cat(parts).tolist() == [*range(start, stop)]
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_chunks_point_at_the_elements_they_claim(shape: tuple[int, ...], seed: int) -> None:
    rng = random.Random(seed)
    numel = torch.Size(shape).numel()
    before, after = rng.randint(0, 5), rng.randint(0, 5)
    total = before + numel + after
    cuts = sorted(rng.sample(range(1, total), min(3, total - 1))) if total > 1 else []
    starts = [0, *cuts]
    segments = [
        Segment(start, stop - start, f"rank{n}", 1000 * n)
        for n, (start, stop) in enumerate(zip(starts, [*cuts, total], strict=True))
    ]
    where = {}  # (file, byte) -> element of the vector
    for segment in segments:
        for inside in range(segment.numel):
            where[segment.file, segment.offset + 4 * inside] = segment.start + inside
    found = torch.full(shape, -1)
    for chunk in chunks_of(shape, segments, at=before, itemsize=4):
        count = torch.Size(chunk.sizes).numel()
        assert chunk.extent.nbytes == 4 * count
        elements = [where[chunk.extent.file, chunk.extent.offset + 4 * n] for n in range(count)]
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        found[box] = torch.tensor(elements).reshape(chunk.sizes) - before
    assert torch.equal(found, torch.arange(numel).reshape(shape))
