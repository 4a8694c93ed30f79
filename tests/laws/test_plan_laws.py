"""fill_of() against the one implementation nobody doubts: torch's reshape, permute and slice."""

from __future__ import annotations

import random

import pytest
import torch

from dcpconv.core.catalog import Chunk, Extent, TensorEntry, c_strides
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError
from dcpconv.core.layout import Layout
from dcpconv.core.outline import Fill
from dcpconv.plan.coverage import Piece, Target
from dcpconv.plan.fills import fill_of, row_chunks
from support.checkpoints.layouts import as_stored, stored_layout

INT32 = BY_NAME["int32"]
ITEMSIZE = 4
AXES = ("a", "b", "c", "k")
SEEDS = range(60)


def cut(rng: random.Random, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
    """A random partition of a tensor into boxes: rows or columns first, then each piece again."""
    boxes: list[tuple[tuple[int, ...], ...]] = [((0,) * len(shape), shape)]
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(boxes))
        offsets, sizes = boxes[at]
        dim = rng.randrange(len(shape))
        if sizes[dim] < 2:
            continue
        where = rng.randint(1, sizes[dim] - 1)
        left = (*sizes[:dim], where, *sizes[dim + 1 :])
        right = (*sizes[:dim], sizes[dim] - where, *sizes[dim + 1 :])
        moved = (*offsets[:dim], offsets[dim] + where, *offsets[dim + 1 :])
        boxes[at : at + 1] = [(offsets, left), (moved, right)]
    return boxes


def store(
    rng: random.Random, tensor: torch.Tensor, key: str = "x"
) -> tuple[TensorEntry, dict[str, torch.Tensor]]:
    """A catalog entry whose chunks lie, some of them strided, in files of int32."""
    chunks, files = [], {}
    for number, (offsets, sizes) in enumerate(cut(rng, tuple(tensor.shape))):
        box = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        name = f"{key}.{number}"
        strides = None
        if rng.random() < 0.3 and box.ndim >= 2:
            flat = box.transpose(0, -1).contiguous()
            strides = list(c_strides(tuple(flat.shape)))
            strides[0], strides[-1] = strides[-1], strides[0]
            box = flat
        gap = rng.randint(0, 5)
        files[name] = torch.cat([torch.full((gap,), -1, dtype=torch.int32), box.flatten()])
        extent = Extent(name, gap * ITEMSIZE, box.numel() * ITEMSIZE)
        chunks.append(Chunk(offsets, sizes, extent, tuple(strides) if strides else None))
    return TensorEntry(key, INT32, tuple(tensor.shape), tuple(chunks)), files


def carry_out(fill: Fill, files: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Element by element: the values, and how often each element was written."""
    values = torch.zeros(fill.numel, dtype=torch.int32)
    times = torch.zeros(fill.numel, dtype=torch.int32)
    for part in fill.parts:
        sources, targets = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        for count, source_step, target_step in part.loops:
            steps = torch.arange(count)
            sources = (sources[:, None] + steps * source_step).flatten()
            targets = (targets[:, None] + steps * target_step).flatten()
        values[part.target + targets] = files[part.file][part.offset // ITEMSIZE + sources]
        times[part.target + targets] += 1
    return values, times


@pytest.mark.parametrize("seed", SEEDS)
def test_any_region_of_any_layout_is_covered_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    axes = list(AXES[: rng.randint(1, 4)])
    sizes = {axis: rng.randint(1, 5) for axis in axes}
    shape = tuple(sizes.values())
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    source = Layout(stored_layout(rng, axes))
    wanted = Layout(stored_layout(rng, axes))
    entry, files = store(rng, as_stored(values, axes, source))
    expected = as_stored(values, axes, wanted)
    piece = Piece(entry, source.place(sizes), wanted.place(sizes))
    target = Target("y", tuple(expected.shape), INT32, (piece,))

    offsets = tuple(rng.randint(0, n - 1) for n in expected.shape)
    lengths = tuple(rng.randint(1, n - o) for n, o in zip(expected.shape, offsets, strict=True))
    found, times = carry_out(fill_of(target, offsets, lengths), files)

    region = expected[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
    assert torch.equal(times, torch.ones_like(times))
    assert torch.equal(found.reshape(lengths), region)


@pytest.mark.parametrize("seed", SEEDS)
def test_fused_tensors_split_and_join(seed: int) -> None:
    """One stored tensor holds several slots, as a fused qkv does; and back again."""
    rng = random.Random(seed)
    sizes = {"h": rng.randint(1, 4), "g": rng.randint(1, 3), "e": 4, "d": rng.randint(1, 5)}
    parts = {
        name: torch.arange(sizes[n] * 4 * sizes["d"], dtype=torch.int32).reshape(-1, sizes["d"])
        + 1000 * number
        for number, (name, n) in enumerate({"q": "h", "k": "g", "v": "g"}.items())
    }
    fused = Layout("[(h e) | (g e) | (g e)] d")
    single = {"q": Layout("(h e) d"), "k": Layout("(g e) d"), "v": Layout("(g e) d")}
    whole = torch.cat(list(parts.values()))

    entries: list[Piece] = []
    files: dict[str, torch.Tensor] = {}
    for term, (name, tensor) in enumerate(parts.items()):
        entry, more = store(rng, tensor, name)
        files |= more
        entries.append(Piece(entry, single[name].place(sizes), fused.place(sizes, term)))
    target = Target("qkv", tuple(whole.shape), INT32, tuple(entries))
    joined, times = carry_out(fill_of(target, (0, 0), tuple(whole.shape)), files)
    assert torch.equal(joined.reshape(whole.shape), whole)
    assert int(times.min()) == int(times.max()) == 1

    entry, files = store(rng, whole, "qkv")
    for term, (name, tensor) in enumerate(parts.items()):
        piece = Piece(entry, fused.place(sizes, term), single[name].place(sizes))
        shape = tuple(tensor.shape)
        found, _ = carry_out(fill_of(Target(name, shape, INT32, (piece,)), (0, 0), shape), files)
        assert torch.equal(found.reshape(shape), tensor)


def test_one_expert_of_a_stack() -> None:
    stack = torch.arange(3 * 4 * 5, dtype=torch.int32).reshape(3, 4, 5)
    sizes = {"E": 3, "m": 4, "d": 5}
    entry, files = store(random.Random(1), stack)
    for expert in range(3):
        piece = Piece(
            entry,
            Layout("E m d").place(sizes),
            Layout("m d").place(sizes),
            {"E": (expert, expert + 1)},
        )
        found, _ = carry_out(fill_of(Target("y", (4, 5), INT32, (piece,)), (0, 0), (4, 5)), files)
        assert torch.equal(found.reshape(4, 5), stack[expert])


def test_a_lost_chunk_is_an_error_and_never_zeros() -> None:
    chunk = Chunk((0, 0), (2, 3), Extent("x", 0, 24))
    entry = TensorEntry("x", INT32, (4, 3), (chunk,))

    with pytest.raises(FormatError, match="do not cover the tensor exactly once"):
        fill_of(Target("y", (4, 3), INT32, (Piece(entry),)), (0, 0), (4, 3))


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_row_chunks_are_those_of_torch_chunk(rows: int, ranks: int) -> None:
    tensor = torch.arange(rows * 2).reshape(rows, 2)

    found = [tensor[o[0] : o[0] + s[0]] for o, s in row_chunks((rows, 2), ranks)]

    expected = torch.chunk(tensor, ranks)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
