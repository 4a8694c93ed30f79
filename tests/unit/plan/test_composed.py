"""Composed against torch doing the same moves with real tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcpconv.core.catalog import Chunk, Extent, TensorEntry
from dcpconv.core.dtypes import BY_LABEL
from dcpconv.core.errors import LayoutError
from dcpconv.engine.boxes import Box
from dcpconv.plan.composed import Composed
from dcpconv.plan.coverage import Target
from dcpconv.plan.fills import fill_of
from dcpconv.stores.local import Sources

INT64 = BY_LABEL["i64"]
Moves = Callable[[list[Tensor]], Tensor]
Plans = Callable[[list[Composed]], Composed]


def interleave(tensor: Tensor, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim : dim + 1] = [shape[dim] // 2, 2]
    return tensor.reshape(shape).transpose(dim, dim + 1).reshape(tensor.shape)


def composed_interleave(one: Composed, dim: int) -> Composed:
    shape = (*one.shape[:dim], one.shape[dim] // 2, 2, *one.shape[dim + 1 :])
    return one.reshape(shape).transpose(dim, dim + 1).reshape(one.shape)


CASES = [
    pytest.param([(4, 6)], lambda t: t[0], lambda c: c[0], id="as-it-is"),
    pytest.param(
        [(4, 6)] * 3, lambda t: torch.stack(t, 0), lambda c: Composed.stack(c, 0), id="stack"
    ),
    pytest.param(
        [(4, 6)] * 3, lambda t: torch.stack(t, 2), lambda c: Composed.stack(c, 2), id="stack-last"
    ),
    pytest.param(
        [(4, 6), (5, 6)],
        lambda t: torch.cat(t, 0),
        lambda c: Composed.concatenate(c, 0),
        id="concatenate",
    ),
    pytest.param(
        [(4, 6)] * 6,
        lambda t: torch.cat([torch.stack(t[:3]), torch.stack(t[3:])], 1),
        lambda c: Composed.concatenate([Composed.stack(c[:3], 0), Composed.stack(c[3:], 0)], 1),
        id="experts",
    ),
    pytest.param(
        [(9, 5)], lambda t: t[0].chunk(3)[1], lambda c: c[0].split(0, [3, 3, 3])[1], id="chunk"
    ),
    pytest.param(
        [(3, 4, 5)],
        lambda t: t[0].transpose(1, 2)[:, 1:3],
        lambda c: c[0].transpose(1, 2).cut(1, 1, 3),
        id="transpose-cut",
    ),
    pytest.param(
        [(7, 3, 2, 4, 5)],
        lambda t: t[0].reshape(7, -1),
        lambda c: c[0].reshape((7, 120)),
        id="conv-to-linear",
    ),
    pytest.param(
        [(7, 120)],
        lambda t: t[0].reshape(7, 3, 2, 4, 5),
        lambda c: c[0].reshape((7, 3, 2, 4, 5)),
        id="linear-to-conv",
    ),
    pytest.param(
        [(3, 10, 4)],
        lambda t: interleave(t[0], 1).chunk(2, 1)[1],
        lambda c: composed_interleave(c[0], 1).split(1, [5, 5])[1],
        id="interleave-chunk",
    ),
    pytest.param(
        [(24, 5)],
        lambda t: t[0].view(3, 4, 2, 5).transpose(1, 2).reshape(24, 5)[3:17],
        lambda c: c[0].reshape((3, 4, 2, 5)).transpose(1, 2).reshape((24, 5)).cut(0, 3, 17),
        id="rope-cut-inside-heads",
    ),
    pytest.param(
        [(3, 4), (3, 4)],
        lambda t: torch.cat(t, 0)[2:5].T,
        lambda c: Composed.concatenate(c, 0).cut(0, 2, 5).transpose(0, 1),
        id="cut-across-two",
    ),
    pytest.param([(1, 5)], lambda t: t[0].reshape(5), lambda c: c[0].reshape((5,)), id="length-1"),
    pytest.param([()] * 3, torch.stack, lambda c: Composed.stack(c, 0), id="numbers"),
    pytest.param(
        [(0, 5), (2, 5)],
        torch.cat,
        lambda c: Composed.concatenate(c, 0),
        id="nothing-and-something",
    ),
]


def entries(shapes: list[tuple[int, ...]], file: Path) -> tuple[list[Tensor], list[TensorEntry]]:
    """Tensors of different numbers in one file."""
    tensors, found, data = [], [], b""
    for index, shape in enumerate(shapes):
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape) + 1000 * index
        raw = tensor.numpy().tobytes()
        extent = Extent(file.name, len(data), len(raw))
        chunk = Chunk((0,) * len(shape), shape, extent)
        tensors.append(tensor)
        found.append(TensorEntry(f"t{index}", INT64, shape, (chunk,)))
        data += raw
    file.write_bytes(data)
    return tensors, found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shapes", "moves", "plans"), CASES)
def test_any_region_has_the_elements_that_torch_moves_there(
    shapes: list[tuple[int, ...]], moves: Moves, plans: Plans, seed: int, tmp_path: Path
) -> None:
    tensors, found = entries(shapes, tmp_path / "data")
    expected = moves(tensors)
    made = plans([Composed.stored(entry) for entry in found])
    assert made.shape == tuple(expected.shape)
    rng = random.Random(seed)
    offsets = tuple(rng.randint(0, n) if seed else 0 for n in made.shape)
    sizes = tuple(
        rng.randint(0, n - at) if seed else n for n, at in zip(made.shape, offsets, strict=True)
    )
    region = expected[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]

    box = Box(fill_of(Target("t", made.shape, INT64, made.pieces()), offsets, sizes))
    into = memoryview(bytearray(8 * region.numel()))
    with Sources(tmp_path) as sources:
        scratch = memoryview(bytearray(1 << 12))
        box.read(0, region.numel(), sources=sources, into=into, scratch=lambda: scratch)
    assert bytes(into) == region.contiguous().numpy().tobytes()


def test_a_tensor_that_stays_whole_is_one_piece_without_axes(tmp_path: Path) -> None:
    _, (entry,) = entries([(4, 6)], tmp_path / "data")
    twice = Composed.stored(entry).transpose(0, 1).transpose(0, 1)
    assert [piece.wanted for piece in twice.pieces()] == [None]


@pytest.mark.parametrize(
    "impossible",
    [
        pytest.param(lambda c: Composed.stack([c, c.cut(0, 0, 2)], 0), id="unlike-stack"),
        pytest.param(
            lambda c: Composed.concatenate([c, c.transpose(0, 1)], 0), id="unlike-concatenate"
        ),
        pytest.param(lambda c: c.reshape((5, 5)), id="other-size"),
        pytest.param(lambda c: c.transpose(0, 1).reshape((8, 3)), id="crosses"),
        pytest.param(lambda c: c.split(0, [1, 2]), id="does-not-add-up"),
        pytest.param(lambda c: c.cut(2, 0, 1), id="no-such-dim"),
    ],
)
def test_what_is_not_a_move_is_refused(
    impossible: Callable[[Composed], object], tmp_path: Path
) -> None:
    _, (entry,) = entries([(4, 6)], tmp_path / "data")
    with pytest.raises(LayoutError):
        impossible(Composed.stored(entry))
