"""Multiplying out on the way, against torch: the whole matrix first, then permute and slice."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcpconv.core.catalog import Chunk, Extent, Factors, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.layout import Layout
from dcpconv.core.outline import Fill, OutFile, Outline
from dcpconv.engine.dequantise import Computed
from dcpconv.engine.execute import execute
from dcpconv.engine.tensors import memory
from dcpconv.plan.coverage import Piece, Target
from dcpconv.plan.fills import fill_of
from dcpconv.stores.local import Sources
from support.checkpoints.layouts import as_stored, matrix_layout, stored_layout
from support.checkpoints.scaled_blocks import multiplied_out

AXES = ["a", "b", "c", "k"]
FACTORS = ("float32", "bfloat16")
KIB = 1 << 10


def matrix(rng: random.Random, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Random elements and factors of random blocks."""
    rows, columns = shape
    block = (rng.randint(1, rows + 1), rng.randint(1, columns + 1))
    made = torch.Generator().manual_seed(rng.randrange(1 << 30))
    stored = torch.randn(shape, generator=made).to(torch.float8_e4m3fn)
    factors = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=made)
    return stored, factors.to(getattr(torch, rng.choice(FACTORS))), block


def in_file(directory: Path, name: str, stored: Tensor, key: str) -> TensorEntry:
    """A tensor at an odd place of a file of its own."""
    data = stored.contiguous().view(torch.uint8).numpy().tobytes()
    (directory / name).write_bytes(b"abc" + data)
    shape = tuple(stored.shape)
    dtype = BY_NAME[str(stored.dtype).removeprefix("torch.")]
    return TensorEntry(key, dtype, shape, (Chunk((0, 0), shape, Extent(name, 3, len(data))),))


def scaled(entry: TensorEntry, scale: TensorEntry, block: tuple[int, int]) -> TensorEntry:
    """A matrix with its factors."""
    (rows, columns), (down, across) = entry.shape, scale.shape
    return replace(entry, factors=Factors(scale, (rows, columns), block, (down, across)))


def carried_out(directory: Path, fill: Fill, rng: random.Random) -> Tensor:
    """What the engine writes, with as little memory as it agrees to work with."""
    outline = Outline((OutFile("out", fill.nbytes, (), ((0, fill),)),))
    jobs = rng.randint(1, 3)
    (directory / "made").mkdir()
    moved = execute(
        outline, source=directory, target=directory / "made", jobs=jobs, budget=jobs * 48 * KIB
    )
    assert moved.cast == fill.nbytes
    data = bytearray((directory / "made" / "out").read_bytes())
    return torch.frombuffer(data, dtype=getattr(torch, fill.target_dtype.name))


def read_out(directory: Path, fill: Fill, rng: random.Random) -> Tensor:
    """What a live tensor gets, interval by interval, with as little scratch as is asked for."""
    made = torch.zeros(fill.numel, dtype=getattr(torch, fill.target_dtype.name))
    box = Computed(fill)
    edges = sorted({0, fill.numel, *(rng.randint(0, fill.numel) for _ in range(3))})
    with Sources(directory) as sources:
        for start, stop in pairwise(edges):
            box.read(
                start,
                stop,
                sources=sources,
                into=memory(made[start:stop]),
                scratch=lambda: memoryview(bytearray(16 * KIB)),
            )
    return made


def region(rng: random.Random, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    offsets = tuple(rng.choice([0, rng.randint(0, n - 1)]) for n in shape)
    return offsets, tuple(
        rng.choice([n - o, rng.randint(1, n - o)]) for n, o in zip(shape, offsets, strict=True)
    )


def sliced(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


@pytest.mark.parametrize("seed", range(80))
def test_any_region_of_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr("dcpconv.engine.cast.STEP", rng.choice([1, 7, 100, 32 << 10]))
    axes = AXES[: rng.randint(2, 4)]
    sizes = {axis: rng.randint(1, 7) for axis in axes} | {"z": rng.randint(1, 9)}
    placed_text = matrix_layout(rng, axes)
    term = rng.choice([None, 0, 1])  # alone, or fused above or below another slot
    if term is not None:
        rows, columns = placed_text.split(") ")
        alternatives = [f"{rows})", "z"] if term == 0 else ["z", f"{rows})"]
        placed_text = f"[{' | '.join(alternatives)}] {columns}"
    source, wanted = Layout(placed_text), Layout(stored_layout(rng, axes))
    placed = source.place(sizes, term or 0)
    stored, factors, block = matrix(rng, placed.shape)
    entry = in_file(tmp_path, "matrix", stored, "x")
    scale = in_file(tmp_path, "factors", factors, "x_scale_inv")
    piece = Piece(scaled(entry, scale, block), placed, wanted.place(sizes))
    kind = rng.choice(["float32", "bfloat16", "float16"])
    offsets, lengths = region(rng, wanted.shape(sizes))
    target = Target("y", wanted.shape(sizes), BY_NAME["bfloat16"], (piece,))
    fill = fill_of(target, offsets, lengths, dtype=BY_NAME[kind])
    found = carried_out(tmp_path, fill, rng).reshape(lengths)
    assert torch.equal(read_out(tmp_path, fill, rng).reshape(lengths), found)

    whole = multiplied_out(stored, factors, getattr(torch, kind), block=block)
    slot = whole[sizes["z"] :] if term == 1 else whole[: -sizes["z"]] if term == 0 else whole
    order = list(source.axes(term or 0))
    values = slot.reshape([sizes[axis] for axis in order])
    values = values.permute([order.index(axis) for axis in axes])
    assert torch.equal(found, sliced(as_stored(values, axes, wanted), offsets, lengths))


@pytest.mark.parametrize("wanted", ["E [m | m] d", "E d [m | m]", "d E [m | m]", "[m | m] (d E)"])
@pytest.mark.parametrize("seed", range(5))
def test_any_region_of_a_stack_of_fused_matrices(tmp_path: Path, seed: int, wanted: str) -> None:
    rng = random.Random(seed)
    sizes = {"E": rng.randint(1, 4), "m": rng.randint(1, 9), "d": rng.randint(1, 9)}
    layout, single = Layout(wanted), Layout("m d")
    pieces, terms = [], []
    for term in range(2):
        stack = []
        for expert in range(sizes["E"]):
            stored, factors, block = matrix(rng, single.shape(sizes))
            name = f"{term}.{expert}"
            entry = in_file(tmp_path, name, stored, name)
            scale = in_file(tmp_path, f"{name}.factors", factors, f"{name}_scale_inv")
            pieces.append(
                Piece(
                    scaled(entry, scale, block),
                    single.place(sizes),
                    layout.place(sizes, term),
                    {"E": (expert, expert + 1)},
                )
            )
            stack.append(multiplied_out(stored, factors, block=block))
        one = Layout(wanted.replace("[m | m]", "m"))
        terms.append(as_stored(torch.stack(stack), ["E", "m", "d"], one))
    expected = torch.cat(terms, wanted.replace("[m | m]", "m").split(" ").index("m"))
    shape = layout.shape(sizes)
    offsets, lengths = region(rng, shape)
    target = Target("y", shape, BY_NAME["bfloat16"], tuple(pieces))
    fill = fill_of(target, offsets, lengths, dtype=BY_NAME["float32"])
    found = carried_out(tmp_path, fill, rng).reshape(lengths)
    assert torch.equal(read_out(tmp_path, fill, rng).reshape(lengths), found)
    assert torch.equal(found, sliced(expected, offsets, lengths))
