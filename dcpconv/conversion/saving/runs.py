"""What a rank holds of a payload, run by run, in the order of the file.

A run of elements that lies alike in memory and in the file is taken from where it is.  Everything
else (another order, another element type, memory of a device) goes through buffers of ``TILE``
bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcpconv.conversion.saving.shares import Write
from dcpconv.core.outline import Loop, Part
from dcpconv.engine.cast import cast
from dcpconv.engine.execute import CastLoss
from dcpconv.engine.tensors import dtype_of, memory, torch_dtype

TILE = 4 << 20
"""Bytes that are put together in a buffer at a time."""

_PLAIN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Element types that torch moves everywhere, by size: some types of one byte have few operators."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that lie side by side in a file.

    Attributes:
        offset: Of the first, in the file.
        data: The bytes.
        owner: Whose memory they are.
    """

    offset: int
    data: memoryview
    owner: Tensor


@dataclass(frozen=True, slots=True)
class Nest:
    """A part in the order of the file.

    Attributes:
        start: Index of its first element in the item.
        target: Index of its first element in the payload.
        loops: By falling target step.
    """

    start: int
    target: int
    loops: tuple[Loop, ...]

    @property
    def numel(self) -> int:
        """Elements it moves."""
        numel = 1
        for count, _, _ in self.loops:
            numel *= count
        return numel

    def cut(self, most: int) -> Iterator[Nest]:
        """The same in nests of at most ``most`` elements, 1 or more."""
        numel = self.numel
        if numel <= most:
            yield self
            return
        (count, source_step, step), inner = self.loops[0], self.loops[1:]
        together = max(1, most * count // numel)
        for first in range(0, count, together):
            some = min(together, count - first)
            loops = ((some, source_step, step), *inner) if some > 1 else inner
            start, target = self.start + first * source_step, self.target + first * step
            yield from Nest(start, target, loops).cut(most)

    def runs(self) -> tuple[int, list[int]]:
        """How many elements lie side by side in the payload, and where such runs begin, in order;
        what is gathered in the order of the loops is these runs, end to end."""
        run, depth = 1, len(self.loops)
        while depth and self.loops[depth - 1][2] == run:
            run *= self.loops[depth - 1][0]
            depth -= 1
        starts = [self.target]
        for count, _, step in self.loops[:depth]:
            starts = [start + i * step for start in starts for i in range(count)]
        return run, starts

    @property
    def is_plain(self) -> bool:
        """Whether it is one run on both sides."""
        return all(source_step == step for _, source_step, step in self.loops) and (
            len(self.runs()[1]) == 1
        )


def nest_of(part: Part, itemsize: int) -> Nest:
    """A part of an item, in the order of the file."""
    loops = tuple(sorted(part.loops, key=lambda loop: -loop[2]))
    return Nest(part.offset // itemsize, part.target, loops)


@dataclass(slots=True)
class Losses:
    """What casts lost, by payload; threads add to it."""

    _found: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, write: Write, lost: tuple[int, int]) -> None:
        """Count the values that a cast has turned infinite, and into zero."""
        if lost == (0, 0):
            return
        place = write.file, write.offset
        with self._lock:
            known = self._found.get(place, (0, 0))
            self._found[place] = known[0] + lost[0], known[1] + lost[1]

    def all(self) -> tuple[CastLoss, ...]:
        """Everything that was counted."""
        return tuple(CastLoss(*place, *lost) for place, lost in self._found.items())


def runs_of(write: Write, parts: Sequence[Part], held: Tensor, losses: Losses) -> Iterator[Run]:
    """The bytes that parts of an item become.

    Args:
        write: Which payload they are of.
        parts: All of its parts, or what lies in an interval of the payload.
        held: The item.
        losses: Gets what a cast loses.
    """
    if dtype_of(held) is not write.source_dtype:
        raise AssertionError(f"item {write.item} is {held.dtype}, planned as {write.source}")
    flat = _flat(held)
    itemsize, source_itemsize = write.target_dtype.itemsize, write.source_dtype.itemsize
    is_cast = write.source != write.target
    for part in parts:
        nest = nest_of(part, source_itemsize)
        if nest.is_plain and flat.device.type == "cpu" and not is_cast:
            start = nest.start * itemsize
            data = memory(flat)[start : start + nest.numel * itemsize]
            yield Run(write.offset + nest.target * itemsize, data, flat)
            continue
        for tile in nest.cut(TILE // max(itemsize, source_itemsize)):
            gathered = _gathered(flat, tile)
            if is_cast:
                gathered, lost = _cast(gathered, write)
                losses.add(write, lost)
            data = memory(gathered)
            run, starts = tile.runs()
            for index, start in enumerate(starts):
                piece = data[index * run * itemsize : (index + 1) * run * itemsize]
                yield Run(write.offset + start * itemsize, piece, gathered)


def _flat(held: Tensor) -> Tensor:
    """The elements of a tensor in C order; a copy only where its memory has another."""
    flat = held.detach().contiguous().view(-1)
    plain = _PLAIN.get(flat.element_size())
    return flat if plain is None else flat.view(plain)


def _gathered(flat: Tensor, tile: Nest) -> Tensor:
    """The elements of a nest in the order of its loops, in memory of this process."""
    counts = [count for count, _, _ in tile.loops]
    steps = [step for _, step, _ in tile.loops]
    view = flat.as_strided(counts, steps, flat.storage_offset() + tile.start)
    if flat.device.type == "cpu":
        return view.contiguous()
    staging = torch.empty(counts, dtype=flat.dtype, pin_memory=flat.device.type == "cuda")
    return staging.copy_(view)


def _cast(gathered: Tensor, write: Write) -> tuple[Tensor, tuple[int, int]]:
    source, target = write.source_dtype, write.target_dtype
    into = torch.empty(gathered.numel(), dtype=torch_dtype(target))
    lost = cast(memory(gathered), memory(into), source_dtype=source, target_dtype=target)
    return into, lost


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return torch.equal(_flat(one), _flat(other))
