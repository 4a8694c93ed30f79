"""Writes one rank's share from the memory of its tensors into files that others write too.

A run of elements that lies alike in memory and in the file is written from where it is.  Everything
else (another order, another element type, memory of a device) goes through buffers of ``TILE``
bytes: a rank holds at most two of them per thread beyond its tensors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dcpconv.conversion.saving.shares import Share, Write
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Loop, Part
from dcpconv.engine.cast import cast
from dcpconv.engine.copying import write as write_all
from dcpconv.engine.copying import write_error
from dcpconv.engine.execute import CastLoss
from dcpconv.engine.tensors import dtype_of, memory, torch_dtype

TILE = 4 << 20
"""Bytes that are put together in a buffer at a time."""

_WORTH_STARTING = 256 << 10
"""Bytes from which a write is worth a system call to have the disk start on it."""

_PLAIN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Element types that torch moves everywhere, by size: some types of one byte have few operators."""


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
class _Losses:
    """What casts lost, by payload; threads add to it."""

    found: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, write: Write, lost: tuple[int, int]) -> None:
        if lost == (0, 0):
            return
        place = write.file, write.offset
        with self.lock:
            known = self.found.get(place, (0, 0))
            self.found[place] = known[0] + lost[0], known[1] + lost[1]


def write_share(
    share: Share,
    *,
    item: Callable[[int], Tensor],
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[CastLoss, ...]:
    """Write, sync and close everything that this rank holds.

    Args:
        share: What to write where.
        item: The tensor of an item of the rank's plan; its memory may be on any device.
        jobs: Threads; by default as many as there are CPUs, 4 at most.
        progress: Called from the threads with bytes written since its last call.

    Returns:
        What casts changed by more than rounding.

    Raises:
        FormatError: A file is not there: this rank does not see the coordinator's directory.
        NoSpaceError: The disk is full.
    """
    losses = _Losses()
    advance = progress or (lambda _: None)
    with ExitStack() as stack:
        names = dict.fromkeys(write.file for write in share.writes)
        fds = {name: _open(share.directory / name, stack) for name in names}
        pool = ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1), "dcpconv-save")
        stack.callback(pool.shutdown, cancel_futures=True)

        def perform(write: Write) -> None:
            _perform(write, item(write.item), fds[write.file], share.directory, losses)
            advance(write.nbytes)

        for future in [pool.submit(perform, write) for write in share.writes]:
            future.result()
        for name, fd in fds.items():
            try:
                os.fsync(fd)
            except OSError as error:
                raise write_error(error, share.directory / name) from error
    return tuple(CastLoss(*place, *lost) for place, lost in losses.found.items())


def _open(path: Path, stack: ExitStack) -> int:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FormatError(
            "a rank cannot open a file that rank 0 has made",
            [("file", path), ("reason", error.strerror)],
            hint="save to a directory that every rank sees under the same name",
        ) from error
    stack.callback(os.close, fd)
    return fd


def _perform(write: Write, held: Tensor, fd: int, directory: Path, losses: _Losses) -> None:
    if dtype_of(held) is not write.source_dtype:
        raise AssertionError(f"item {write.item} is {held.dtype}, planned as {write.source}")
    flat = _flat(held)
    itemsize = write.target_dtype.itemsize
    try:
        for part in write.parts:
            nest = nest_of(part, write.source_dtype.itemsize)
            if nest.is_plain and flat.device.type == "cpu" and write.source == write.target:
                start = nest.start * itemsize
                data = memory(flat)[start : start + nest.numel * itemsize]
                _put(fd, data, write.offset + nest.target * itemsize)
                continue
            for tile in nest.cut(TILE // max(itemsize, write.source_dtype.itemsize)):
                gathered = _gathered(flat, tile)
                if write.source != write.target:
                    gathered, lost = _cast(gathered, write)
                    losses.add(write, lost)
                data = memory(gathered)
                run, starts = tile.runs()
                for index, start in enumerate(starts):
                    piece = data[index * run * itemsize : (index + 1) * run * itemsize]
                    _put(fd, piece, write.offset + start * itemsize)
    except OSError as error:
        raise write_error(error, directory / write.file) from error


def _put(fd: int, data: memoryview, offset: int) -> None:
    write_all(fd, data, offset)
    if len(data) >= _WORTH_STARTING and hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)


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


def unequal(pairs: Sequence[tuple[str, str]], source: Path) -> FormatError:
    """The error for names of one tensor that hold different values."""
    return FormatError(
        "two names of one tensor hold different values",
        [("source", source), *(("key", f"{key} is tied to {owner}") for key, owner in pairs)],
        hint='spec="tied=false" saves them as two tensors, and says so in the config',
    )
