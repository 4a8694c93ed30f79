"""Small tensors that follow each other in a file are read together, wherever they land."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dcpconv.engine.boxes import MAX_GAP, MAX_IOVECS
from dcpconv.formats.opening import open_checkpoint
from dcpconv.loading import reading
from dcpconv.loading.reading import Landing, read_landings
from dcpconv.loading.supply import Options, prepare
from dcpconv.plan.fills import fill_of
from dcpconv.stores.local import Sources
from dcpconv.stores.system import SYSTEM

Want = tuple[str, slice, Tensor]
"""Key, rows of the tensor, and the memory they belong in."""


def read(path: Path, wants: Sequence[Want], *, jobs: int = 1) -> tuple[list[int], int]:
    """Reads rows; returns the buffers of every system call, and bytes told as progress."""
    supply = prepare(path, Options())
    targets = supply.targets()
    landings = []
    for key, rows, into in wants:
        rest = targets[key].shape[1:]
        sizes = (rows.stop - rows.start, *rest)
        fill = fill_of(targets[key], (rows.start, *(0 for _ in rest)), sizes)
        landings.append(Landing(key, fill, 0, into))
    calls: list[int] = []
    told: list[int] = []

    def preadv(fd: int, views: Sequence[memoryview], offset: int) -> int:
        calls.append(len(views))
        return os.preadv(fd, views, offset)

    system = replace(SYSTEM, preadv=preadv)
    with Sources(supply.catalog.path, system=system) as sources:
        read_landings(landings, sources=sources, jobs=jobs, progress=told.append)
    return calls, sum(told)


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """3,000 vectors of 40 bytes in one file."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"w.{n}": torch.randn(10, generator=generator) for n in range(3000)}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_small_tensors_take_few_calls(
    many: tuple[Path, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    path, weights = many
    wants = [(key, slice(0, 10), torch.zeros(10, dtype=dtype)) for key in weights]
    calls, told = read(path, wants)
    assert len(calls) == -(-3000 // (MAX_IOVECS // 2))
    assert max(calls) <= MAX_IOVECS
    assert told == 3000 * 40
    for key, _, into in wants:
        assert torch.equal(into, weights[key].to(dtype))


def test_small_gaps_are_read_over_and_others_are_not(
    many: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, weights = many
    shards = [(key, slice(3, 6), torch.zeros(3)) for key in weights]
    calls, _ = read(path, shards)
    assert len(calls) == -(-3000 // (MAX_IOVECS // 2))
    assert max(calls) <= MAX_IOVECS
    for key, rows, into in shards:
        assert torch.equal(into, weights[key][rows])
    far = {f"w.{n}": torch.full((MAX_GAP // 4, 3), float(n)) for n in range(9)}
    save_file(far, tmp_path / "far.safetensors")
    firsts = [(key, slice(0, 1), torch.zeros(1, 3)) for key in far]
    calls, _ = read(tmp_path / "far.safetensors", firsts)
    assert calls == [1] * 9
    assert [float(into[0, 0]) for _, _, into in firsts] == [*map(float, range(9))]


@pytest.mark.parametrize("seed", range(20))
def test_any_mixture_is_what_slicing_gives(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(reading, "_SMALL", rng.choice([0, 200, 4000]))
    monkeypatch.setattr(reading, "_MOST", rng.choice([1, 2, 7, 512]))
    monkeypatch.setattr(reading, "BUFFER", rng.choice([512, 4000, 1 << 20]))
    stored = [torch.float32, torch.bfloat16, torch.float16]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for n in range(rng.randrange(2, 60)):
        shape = (rng.randrange(1, 9), *([rng.randrange(1, 50)] * rng.randrange(2)))
        weights[f"w.{n}"] = torch.randn(shape, generator=generator).to(rng.choice(stored))
    files = [f"model-{n}.safetensors" for n in range(rng.randrange(1, 4))]
    places = {key: rng.choice(files) for key in weights}
    (tmp_path / "hf").mkdir()
    for file in {*places.values()}:
        some = {key: weights[key] for key in weights if places[key] == file}
        save_file(some, tmp_path / "hf" / file)
    wants: list[Want] = []
    for key, weight in weights.items():
        start = rng.randrange(weight.shape[0])
        rows = slice(start, rng.randrange(start, weight.shape[0]) + 1)
        shape = weight[rows].shape
        into = torch.zeros(shape, dtype=rng.choice([weight.dtype, *stored]))
        if len(shape) == 2 and rng.random() < 0.3:
            into = torch.zeros(shape[1], shape[0], dtype=into.dtype).t()  # strided
        wants.append((key, rows, into))
    rng.shuffle(wants)
    assert {*open_checkpoint(tmp_path / "hf").tensors} == {*weights}
    _, told = read(tmp_path / "hf", wants, jobs=rng.choice([1, 3]))
    for key, rows, into in wants:
        assert torch.equal(into, weights[key][rows].to(into.dtype)), key
    assert told == sum(weights[key][rows].nbytes for key, rows, _ in wants)
