"""Read source bytes straight into the memory of live tensors, with several threads.

Memory that matches (CPU, contiguous, the source's dtype) is read into directly and costs no buffer;
small tensors that follow each other in a file share one system call, wherever each of them lands.
Everything else goes through the tiles of ``staging``: a cast, a strided tensor, a CUDA device.
Weights in scaled blocks are read as fp32, the type in which they are multiplied out.  Buffers are
at most ``3 * BUFFER`` per thread, twice as much for casts on their way to a device, plus one row
where a strided tensor has longer rows than that.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dcpconv.core.outline import Fill
from dcpconv.engine.apart import read_apart
from dcpconv.engine.boxes import MAX_IOVECS, Box, ByteRun, read_runs
from dcpconv.engine.cast import cast
from dcpconv.engine.dequantise import Computed, plain_box
from dcpconv.engine.strided import assign
from dcpconv.engine.tensors import dtype_of, memory
from dcpconv.engine.wanting import of_box
from dcpconv.loading.pages import populate
from dcpconv.loading.staging import BUFFER, Desk, device_of, is_beyond
from dcpconv.stores.ahead import WINDOW, Ahead, Wanted
from dcpconv.stores.local import Sources

_DIRECT = 32 << 20
"""Bytes that a thread reads at a time where no buffer is needed: enough to keep it busy, few enough
that threads finish together."""

_SMALL = 512 << 10
"""Bytes of a run that is read together with its neighbours: taking a run by itself costs as much
work as moving about so many bytes."""

_MOST = MAX_IOVECS // 2
"""Runs that are read together, so that with the gaps between them they are one system call."""


@dataclass(frozen=True)
class Landing:
    """An interval of a box, and the memory it belongs in.

    Attributes:
        key: Whose it is.
        fill: The box; its target dtype is what is read.
        start: First element of the box that is wanted, in C order.
        into: Memory of ``into.numel()`` elements from there on; any device, dtype and strides.
    """

    key: str
    fill: Fill
    start: int
    into: Tensor

    @cached_property
    def box(self) -> Readable:
        """The box, prepared for reading."""
        return box_of(self.fill)

    @property
    def nbytes(self) -> int:
        """Bytes to read; the factors of scaled blocks are not counted."""
        return self.into.numel() * self.fill.source_dtype.itemsize

    @property
    def is_cast(self) -> bool:
        """Whether the memory has another dtype than what is read."""
        return dtype_of(self.into) is not self.fill.target_dtype

    @cached_property
    def is_direct(self) -> bool:
        """Whether bytes can be read into the memory as they are."""
        into = self.into
        return not is_beyond(into) and into.is_contiguous() and not self.is_cast


@dataclass(frozen=True, slots=True)
class _Unit:
    """Elements ``start`` to ``stop`` of a landing and where they go."""

    landing: Landing
    start: int
    stop: int
    into: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes as they are read."""
        return (self.stop - self.start) * self.landing.box.itemsize

    @property
    def run(self) -> tuple[str, int] | None:
        """File and first byte, where it is one run of a file."""
        box = self.landing.box
        if not isinstance(box, Box) or box.is_relabelled or len(box.fill.parts) != 1:
            return None
        (part,) = box.fill.parts
        return part.file, part.offset + (self.start - part.target) * box.itemsize


_Units = tuple[_Unit, ...]
"""What a thread takes at a time: one unit, or small ones that follow each other in a file."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A box whose bytes follow from the config: it is read like any other, but from memory."""

    data: bytes
    itemsize: int
    is_relabelled: bool = False

    def tile(self, nbytes: int) -> int:
        """Elements per tile of at most ``nbytes``."""
        return max(1, nbytes // self.itemsize)

    def read(self, start: int, stop: int, *, into: memoryview, **_unused: object) -> None:
        """Put elements ``start`` to ``stop`` into ``into``."""
        into[:] = self.data[start * self.itemsize : stop * self.itemsize]


Readable = Box | Derived | Computed
"""A box that can be read interval by interval."""


def box_of(fill: Fill) -> Readable:
    """A fill, prepared for reading."""
    if fill.data is not None:
        return Derived(fill.data, fill.source_dtype.itemsize)
    return Computed(fill) if fill.scales or fill.changes else Box(fill)


def place_of(fill: Fill) -> tuple[str, int]:
    """Where the first element of a fill is stored: what is read in this order is read forwards."""
    return (fill.parts[0].file, fill.parts[0].offset) if fill.parts else ("", 0)


def read_pieces(
    pieces: Sequence[tuple[Readable, int, int, int]], *, sources: Sources, into: memoryview
) -> None:
    """Fill one buffer with intervals of many boxes: neighbours in a file are read together.

    Args:
        pieces: ``(box, first element, end, byte of the buffer)``.
        sources: Where the parts' files are open.
        into: The buffer.

    Raises:
        FormatError: A source file is missing, unreadable or too short.
    """
    runs: dict[str, list[ByteRun]] = {}
    for box, start, stop, at in pieces:
        if isinstance(box, Box) and not box.is_relabelled:
            for part in box.parts_in(start, stop):
                begin = at + (part.target - start) * box.itemsize
                run = (part.offset, begin, part.numel * box.itemsize)
                runs.setdefault(part.file, []).append(run)
        else:
            end = at + (stop - start) * box.itemsize
            box.read(start, stop, sources=sources, into=into[at:end], assign=assign)
    read_runs(runs, sources=sources, into=into)


def read_landings(
    landings: Sequence[Landing],
    *,
    sources: Sources,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, tuple[int, int]]:
    """Fill all landings, in the order of the files.

    Args:
        landings: What to read; memory must not overlap.
        sources: Where the parts' files are open.
        jobs: Threads; by default as many as there are CPUs, 4 at most.
        progress: Called from the threads with bytes read since its last call.
        stop: Nothing more is read once it is set.

    Returns:
        ``(overflowed, underflowed)`` values of every key that a cast changed by more than rounding.

    Raises:
        FormatError: A source file is missing, unreadable or too short.
    """
    direct = WINDOW if sources.is_remote else _DIRECT
    in_order = sorted(landings, key=lambda landing: place_of(landing.fill))
    units = [unit for landing in in_order for unit in _units(landing, direct)]
    if sources.is_remote:  # neighbours are fetched together
        units.sort(key=lambda unit: next(iter(_wanted((unit,))), ("", 0, 0)))
        listed: list[_Units] = [(unit,) for unit in units]
    else:
        listed = [*_together(units)]
    work = Ahead(sources, listed, _wanted)
    lock, errors = threading.Lock(), list[BaseException]()
    losses: dict[str, tuple[int, int]] = {}

    far = next((one.into for one in landings if is_beyond(one.into)), None)

    def loop() -> None:
        near = Desk()
        beyond = Desk(device_of(far)) if far is not None else near
        try:
            beyond.begin()
            while not errors and not (stop is not None and stop.is_set()):
                with lock:
                    some = next(work, None)
                if some is None:
                    break
                desk = beyond if is_beyond(some[0].into) else near
                for unit, lost in zip(some, _perform(some, sources, desk), strict=True):
                    if any(lost):
                        with lock:
                            over, under = losses.get(unit.landing.key, (0, 0))
                            losses[unit.landing.key] = (over + lost[0], under + lost[1])
                work.done(some)
                if progress is not None:
                    progress(sum(unit.nbytes for unit in some))
            beyond.finish()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    count = jobs or min(4, os.cpu_count() or 1)
    threads = [threading.Thread(target=loop, name=f"read-{n}") for n in range(count - 1)]
    for thread in threads:
        thread.start()
    loop()
    for thread in threads:
        thread.join()
    work.close()
    if errors:
        raise errors[0]
    return losses


def _wanted(some: _Units) -> Iterable[Wanted]:
    for unit in some:
        yield from wanted(unit.landing.box, unit.start, unit.stop)


def wanted(box: Readable, start: int, stop: int) -> Iterable[Wanted]:
    """What of its sources an interval reads; factors beside them are read when needed."""
    return () if isinstance(box, Derived) else of_box(plain_box(box), start, stop)


def _units(landing: Landing, direct: int) -> Iterator[_Unit]:
    into, numel = landing.into, landing.into.numel()
    if not numel:
        return
    box = landing.box
    if landing.is_direct or into.is_contiguous():
        nbytes = direct if landing.is_direct and not box.is_relabelled else BUFFER
        step, flat = box.tile(nbytes), into.view(-1)
        for at in range(0, numel, step):
            stop = min(at + step, numel)
            yield _Unit(landing, landing.start + at, landing.start + stop, flat[at:stop])
        return
    row = math.prod(into.shape[1:])
    rows = max(1, BUFFER // (row * box.itemsize))
    for at in range(0, into.shape[0], rows):
        part = into[at : at + rows]
        start = landing.start + at * row
        yield _Unit(landing, start, start + part.numel(), part)


def _together(units: Iterable[_Unit]) -> Iterator[_Units]:
    """Small runs that follow each other in a file as one piece of work, others by themselves."""
    some: list[_Unit] = []
    file, total = "", 0
    for unit in units:
        nbytes = max(unit.nbytes, unit.into.nbytes)
        run = unit.run if nbytes <= _SMALL else None
        if some and (
            run is None
            or run[0] != file
            or total + nbytes > BUFFER // 2
            or len(some) == _MOST
            or is_beyond(unit.into) != is_beyond(some[0].into)
        ):
            yield tuple(some)
            some, total = [], 0
        if run is None:
            yield (unit,)
            continue
        file = run[0]
        some.append(unit)
        total += nbytes
    if some:
        yield tuple(some)


def _perform(some: _Units, sources: Sources, desk: Desk) -> list[tuple[int, int]]:
    """Read units; returns ``(overflowed, underflowed)`` of each."""
    aside = [not unit.landing.is_direct for unit in some]
    if any(aside):
        desk.next_tile()
    sizes = [
        (unit.stop - unit.start) * unit.landing.fill.target_dtype.itemsize if is_aside else 0
        for unit, is_aside in zip(some, aside, strict=True)
    ]
    tiles = desk.tiles("read", sizes)
    for unit in some:
        populate(unit.into)
    rooms = [
        memory(tile if is_aside else unit.into)
        for unit, tile, is_aside in zip(some, tiles, aside, strict=True)
    ]
    if len(some) == 1:
        (unit,), (room,) = some, rooms
        box = unit.landing.box
        box.read(
            unit.start,
            unit.stop,
            sources=sources,
            into=room,
            scratch=desk.scratch,
            assign=assign,
        )
    else:
        runs = [(unit.run or ("", 0), room) for unit, room in zip(some, rooms, strict=True)]
        file = runs[0][0][0]
        read_apart(file, ((offset, room) for (_, offset), room in runs), sources=sources)
    return _deliver(some, tiles, aside, desk)


def _deliver(
    some: _Units, tiles: Sequence[Tensor], aside: Sequence[bool], desk: Desk
) -> list[tuple[int, int]]:
    """Bring what was read into a buffer to where it belongs."""
    is_made = [
        unit.landing.is_cast and not (desk.device is None and unit.into.is_contiguous())
        for unit in some
    ]
    made = desk.tiles(
        "cast", [unit.into.nbytes if one else 0 for unit, one in zip(some, is_made, strict=True)]
    )
    lost = [(0, 0)] * len(some)
    for number, (unit, tile) in enumerate(zip(some, tiles, strict=True)):
        if not aside[number]:
            continue
        read = tile
        if unit.landing.is_cast:
            read = made[number] if is_made[number] else unit.into
            source, target = unit.landing.fill.target_dtype, dtype_of(unit.into)
            lost[number] = cast(
                memory(tile), memory(read), source_dtype=source, target_dtype=target
            )
        if read is not unit.into:
            desk.deliver(read.view(unit.into.dtype).view(unit.into.shape), unit.into)
    return lost
