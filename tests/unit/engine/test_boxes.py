"""How a box is read: which calls, in which order, and what is refused."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.outline import Fill, Part
from dcpconv.engine import strided
from dcpconv.engine.boxes import LONG_RUN, MAX_GAP, Box, restrict
from dcpconv.engine.spans import Assign, assign_runs
from dcpconv.stores.local import Sources
from dcpconv.stores.system import SYSTEM
from support.checkpoints.engine_cases import INTEGERS, contiguous, random_fill, slow_fill, store

BF16 = BY_NAME["bfloat16"]
ROPE = ((3, 8 * 300, 8 * 300), (4, 300, 2 * 300), (2, 4 * 300, 300), (300, 1, 1))
"""Three heads of four pairs of 300-element rows: ``(h two p) d`` to ``(h p two) d``."""


def read(
    directory: Path, box: Box, start: int, stop: int, *, assign: Assign | None = None
) -> tuple[bytearray, list[tuple[int, int, int]]]:
    """The interval, and ``(offset, nbytes, buffers)`` of every read."""
    calls = []

    def preadv(fd: int, views: Sequence[memoryview], offset: int) -> int:
        calls.append((offset, sum(len(view) for view in views), len(views)))
        return os.preadv(fd, views, offset)

    into = bytearray((stop - start) * box.itemsize)
    with Sources(directory, system=replace(SYSTEM, preadv=preadv)) as sources:
        box.read(start, stop, sources=sources, into=memoryview(into), assign=assign)
    return into, calls


def test_a_head_is_one_read_that_puts_every_row_in_place(tmp_path: Path) -> None:
    files = {"a": random.Random(0).randbytes(64 + 3 * 8 * 300 * 2)}
    fill = Fill(BF16, BF16, 3 * 8 * 300, (Part("a", 64, 0, ROPE),))
    box = Box(fill)
    head = 8 * 300
    into, calls = read(store(tmp_path, files), box, head, 2 * head)

    assert calls == [(64 + head * 2, head * 2, 8)]
    assert into == slow_fill(fill, files)[head * 2 : head * 4]


def test_small_gaps_are_read_through_and_large_ones_skipped(tmp_path: Path) -> None:
    files = {"a": random.Random(0).randbytes(200_000)}
    near, far = contiguous("a", 1000, 500), contiguous("a", 90_000, 500, target=1000)
    fill = Fill(
        BF16, BF16, 1500, (contiguous("a", 0, 500), replace(near, offset=1500, target=500), far)
    )
    into, calls = read(store(tmp_path, files), Box(fill), 0, 1500)

    assert calls == [(0, 2500, 3), (90_000, 1000, 1)]
    assert into == slow_fill(fill, files)


def test_more_rows_than_one_call_takes_are_read_in_several(tmp_path: Path) -> None:
    files = {"a": random.Random(0).randbytes(3000 * 512)}
    loops = ((2, 1500 * 256, 256), (1500, 256, 512), (256, 1, 1))
    fill = Fill(BF16, BF16, 3000 * 256, (Part("a", 0, 0, loops),))
    into, calls = read(store(tmp_path, files), Box(fill), 0, fill.numel)

    assert max(buffers for *_, buffers in calls) <= 1024
    assert len(calls) <= 4
    assert into == slow_fill(fill, files)


@pytest.mark.parametrize(
    ("row", "run", "calls_of_a_span"),
    [
        pytest.param(1024, 512, 1, id="half-of-every-row"),
        pytest.param(LONG_RUN, LONG_RUN // 2, 4, id="spans-of-a-mebibyte"),
        pytest.param(LONG_RUN + MAX_GAP, LONG_RUN, 1, id="rows-worth-a-buffer"),
        pytest.param(512 + MAX_GAP + 2, 512, 500, id="gaps-worth-skipping"),
    ],
)
def test_columns_are_read_with_what_lies_between_them(
    tmp_path: Path, row: int, run: int, calls_of_a_span: int
) -> None:
    rows = 500
    files = {"a": random.Random(0).randbytes(rows * row)}
    loops = ((rows, row // 2, run // 2), (run // 2, 1, 1))
    fill = Fill(BF16, BF16, rows * run // 2, (Part("a", 64, 0, loops),))
    files["a"] += files["a"][:64]
    into, calls = read(store(tmp_path, files), Box(fill), 0, fill.numel, assign=strided.assign)

    assert len(calls) == calls_of_a_span
    assert into == slow_fill(fill, files)


@pytest.mark.parametrize("itemsize", INTEGERS)
@pytest.mark.parametrize("seed", range(40))
def test_a_nest_is_assigned_at_once_as_run_by_run(seed: int, itemsize: int) -> None:
    rng = random.Random(seed)
    fill, files = random_fill(rng, dtype=INTEGERS[itemsize], widest=rng.choice([6, 200]))
    for part in fill.parts:
        if part.is_contiguous:
            continue
        loops = part.loops
        if seed % 3 == 0:  # as Tensor.expand() leaves it
            (count, _, target), *inner = loops
            loops = ((count, 0, target), *inner)
        source = memoryview(files[part.file])[part.offset :]
        one, other = (memoryview(bytearray(fill.nbytes)) for _ in range(2))
        reach = itemsize * (1 + sum((count - 1) * step for count, step, _ in loops))
        assign_runs(loops, itemsize, source[:reach], one)
        strided.assign(loops, itemsize, source[:reach], other)
        assert one == other


def test_a_transpose_reads_each_span_once(tmp_path: Path) -> None:
    files = {"a": random.Random(0).randbytes(100 * 120 * 2)}
    fill = Fill(BF16, BF16, 100 * 120, (Part("a", 0, 0, ((100, 1, 120), (120, 100, 1))),))
    into, calls = read(store(tmp_path, files), Box(fill), 0, fill.numel)

    assert len(calls) == 1
    assert into == slow_fill(fill, files)


def test_a_transpose_with_long_columns_reads_only_what_it_needs(tmp_path: Path) -> None:
    files = {"a": random.Random(0).randbytes(10_000 * 12 * 2)}
    fill = Fill(BF16, BF16, 120_000, (Part("a", 0, 0, ((10_000, 1, 12), (12, 10_000, 1))),))
    into, calls = read(store(tmp_path, files), Box(fill), 12 * 100, 12 * 200)

    assert sum(nbytes for _, nbytes, _ in calls) == 12 * 100 * 2
    assert into == slow_fill(fill, files)[12 * 100 * 2 : 12 * 200 * 2]


@pytest.mark.parametrize("itemsize", INTEGERS)
def test_a_tile_cuts_as_few_loops_as_possible(itemsize: int) -> None:
    dtype = INTEGERS[itemsize]
    box = Box(Fill(dtype, dtype, 3 * 8 * 300, (Part("a", 0, 0, ROPE),)))

    assert box.tile(10**9) % (8 * 300) == 0
    assert box.tile(8 * 300 * itemsize) == 8 * 300
    assert box.tile(700 * itemsize) == 600
    assert box.tile(itemsize) == box.tile(1) == 1


def test_restrict_leaves_a_whole_part_alone() -> None:
    part = Part("a", 64, 0, ROPE)

    assert restrict(part, 0, 10**6, itemsize=2) == (part,)
    assert restrict(part, 3 * 8 * 300, 10**6, itemsize=2) == ()


def test_restrict_cuts_a_nest_into_at_most_two_pieces_per_loop() -> None:
    part = Part("a", 0, 0, ROPE)
    for start, stop in [(1, 7199), (299, 301), (1234, 5678), (2400, 4800)]:
        assert len(restrict(part, start, stop, itemsize=2)) <= 2 * len(ROPE) - 1


def test_long_runs_of_a_nest_are_parts_of_their_own() -> None:
    stacked = Part("a", 10, 5, ((3, 1000, 500), (400, 1, 1)))
    rest = contiguous("b", 0, 1400 - 1200, target=0)
    box = Box(Fill(BF16, BF16, 1400, (rest, stacked)))

    assert box.long_runs(800) == (
        Part("a", 10, 5, ((400, 1, 1),)),
        Part("a", 2010, 505, ((400, 1, 1),)),
        Part("a", 4010, 1005, ((400, 1, 1),)),
    )
    assert box.long_runs(801) == ()


def test_a_box_with_elements_left_out_is_refused() -> None:
    with pytest.raises(ValueError, match="cover 9 of the 10 elements"):
        Box(Fill(BF16, BF16, 10, (contiguous("a", 0, 9),)))
