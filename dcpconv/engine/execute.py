"""Carry out an ``Outline``: move every byte to where it belongs, in constant memory.

Two consumers of the same parts: ``execute`` writes files, ``fill`` answers one box into memory that
the caller owns, such as the shard of a live tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.core.catalog import Identity
from dcpconv.core.errors import LossyCastError
from dcpconv.core.outline import Fill, Outline
from dcpconv.engine.boxes import Box
from dcpconv.engine.copying import Ladder, OutDirectory
from dcpconv.engine.desks import Desk, Pool, Tally
from dcpconv.engine.threads import Crew, Stint
from dcpconv.stores.local import Sources
from dcpconv.stores.system import SYSTEM, System

if TYPE_CHECKING:
    from dcpconv.engine.passing import PassingDigests
    from dcpconv.engine.uploading import Uploads

__all__ = [
    "MOVED",
    "CastLoss",
    "Moved",
    "Sources",
    "execute",
    "fill",
    "refuse_overflow",
    "summed",
    "together",
]

MOVED = tuple(count.name for count in fields(Tally))
"""Names of the ways that bytes move."""

TILE = 4 << 20
"""Bytes put together in a buffer at a time, budget permitting."""

_SMALLEST_TILE = 16 << 10


@dataclass(frozen=True, slots=True)
class CastLoss:
    """What a cast did to values that the target type cannot hold.

    Attributes:
        file: ``OutFile.name``.
        offset: Where the payload starts in it.
        overflowed: Finite values that became infinite or NaN.
        underflowed: Nonzero values that became zero.
    """

    file: str
    offset: int
    overflowed: int
    underflowed: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Payload bytes of the result, by how they got there.

    Attributes:
        reflinked: Shared with the source; no bytes moved.
        copied: Copied by the kernel or the file server.
        buffered: Read and written in the source's order.
        relabelled: Read and written in another order.
        cast: Changed in type; bytes as stored in the result.
        merged: Changed by an adapter, and in type where that was asked for.
        holes: Holes of a sparse source that stay holes.
        losses: Every payload that a cast changed by more than rounding, in order.
        peak_buffer: Most bytes of buffers held at one time.
    """

    reflinked: int
    copied: int
    buffered: int
    relabelled: int
    cast: int
    merged: int
    holes: int
    losses: tuple[CastLoss, ...]
    peak_buffer: int


def execute(
    outline: Outline,
    *,
    source: Path,
    target: Path,
    identities: Mapping[str, Identity] | None = None,
    jobs: int | None = None,
    budget: int = 64 << 20,
    progress: Callable[[int], None] | None = None,
    allow_overflow: bool = False,
    labels: Mapping[tuple[str, int], str] | None = None,
    uploads: Uploads | None = None,
    system: System = SYSTEM,
    stints: Iterable[Stint] | None = None,
    made: int | None = None,
    digests: PassingDigests | None = None,
) -> Moved:
    """Create every file of ``outline`` below ``target``, synced to disk.

    Commit files are not written: they follow once everything is known to be on disk.

    Args:
        outline: What to write.
        source: Directory that ``Part.file`` is relative to.
        target: Existing empty directory.
        stints: The part of it to write, where several processes write one result.
        made: The target, open, where its files are there already.
        digests: Take what is written: the kernel then copies nothing by itself.
        identities: What the source files were when they were planned with (``Catalog.identities``);
            looked at when one is opened, and once more when all is written.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        budget: Bytes of buffers that all threads may hold together.
        progress: Called from the threads with bytes done since its last call; all calls together
            add up to the bytes of all payloads that have parts.  What it raises stops the work.
        allow_overflow: Keep going where a cast turns finite values infinite.
        uploads: Makes objects of the files, where ``target`` is in a store.
        labels: Key of the payload at ``(OutFile.name, offset)``, for error messages.
        system: System calls to copy with.

    Raises:
        LossyCastError: Casts overflowed; raised at the end, listing all of them.
        FormatError: A source file is missing, unreadable or too short.
        SourceChangedError: A source file changed after it was planned with.
        NoSpaceError: The disk is full.
        ValueError: Pieces of a file overlap, exceed it, or leave elements of a box out.
    """
    if budget < 3 * _SMALLEST_TILE:
        raise ValueError(f"budget must be at least {3 * _SMALLEST_TILE} bytes, not {budget}")
    threads = jobs or min(4, os.cpu_count() or 1)
    threads = max(1, min(threads, budget // (3 * _SMALLEST_TILE)))
    size = min(TILE, budget // (3 * threads)) // 4096 * 4096
    size_of_block = 0 if uploads is not None else os.statvfs(target).f_bsize
    block = size_of_block if size_of_block in {512, 1024, 2048, 8192, 16384, 65536} else 4096
    pool = Pool(budget)
    if uploads is not None:
        uploads.digests = digests
    with Sources(source, identities=identities, system=system) as sources:
        crew = Crew(
            stints=((file, None) for file in outline.files) if stints is None else stints,
            target=OutDirectory(target, made, digests),
            sources=sources,
            ladder=Ladder(block, system),
            desks=[Desk(pool, size) for _ in range(threads)],
            progress=progress or (lambda _: None),
            uploads=uploads,
        )
        crew.run()
        if uploads is not None:
            uploads.settle()
        sources.require_unchanged()
    total = Tally()
    losses: list[CastLoss] = []
    for desk in crew.desks:
        total.add(desk.tally)
        losses += [CastLoss(*place, *lost) for place, lost in desk.losses.items()]
    moved = Moved(**asdict(total), losses=tuple(losses), peak_buffer=pool.peak)
    moved = together([moved], outline)
    if not allow_overflow:
        refuse_overflow(moved.losses, labels or {})
    return moved


def together(some: Iterable[Moved], outline: Outline) -> Moved:
    """What several threads or processes moved of one result.

    Args:
        some: What each of them moved.
        outline: The whole result, in whose order the losses are listed.
    """
    total = Tally()
    peak = 0
    losses: list[CastLoss] = []
    for one in some:
        total.add(Tally(*(getattr(one, name) for name in MOVED)))
        peak = max(peak, one.peak_buffer)
        losses += one.losses
    return Moved(**asdict(total), losses=summed(losses, outline), peak_buffer=peak)


def summed(losses: Iterable[CastLoss], outline: Outline) -> tuple[CastLoss, ...]:
    """What casts lost, once for each payload, in the order of the outline."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for loss in losses:
        over, under = found.get((loss.file, loss.offset), (0, 0))
        found[loss.file, loss.offset] = over + loss.overflowed, under + loss.underflowed
    return tuple(
        CastLoss(file.name, offset, *found[file.name, offset])
        for file in (outline.files if found else ())
        for offset, _ in file.payloads
        if (file.name, offset) in found
    )


def fill(fill: Fill, *, source: Path | Sources, into: memoryview) -> None:
    """Read one box straight into the caller's memory, in the source dtype.

    Args:
        fill: What the box consists of; casting is left to the caller.
        source: Directory that ``Part.file`` is relative to, or its files, already open.
        into: C-contiguous writable memory of ``fill.numel`` elements of ``fill.source_dtype``.

    Raises:
        FormatError: A source file is missing, unreadable or too short.
        ValueError: ``into`` has another length, or parts leave elements out.
    """
    nbytes = fill.numel * fill.source_dtype.itemsize
    if into.nbytes != nbytes:
        raise ValueError(f"into holds {into.nbytes} bytes, but the box has {nbytes}")
    if not nbytes:
        return
    view = into.cast("B") if into.ndim != 1 or into.format != "B" else into
    if fill.data is not None:
        view[:] = fill.data
    elif isinstance(source, Path):
        with Sources(source) as opened:
            _read(Box(fill), opened, view)
    else:
        _read(Box(fill), source, view)


def _read(box: Box, sources: Sources, into: memoryview) -> None:
    numel = box.fill.numel
    step = box.tile(TILE) if box.is_relabelled else numel
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        tile = into[start * box.itemsize : stop * box.itemsize]
        box.read(start, stop, sources=sources, into=tile)


def _label(loss: CastLoss, labels: Mapping[tuple[str, int], str]) -> str:
    return labels.get((loss.file, loss.offset), f"{loss.file} at byte {loss.offset}")


def refuse_overflow(losses: Iterable[CastLoss], labels: Mapping[tuple[str, int], str]) -> None:
    """Refuse a result in which casts turned finite values infinite.

    Args:
        losses: What casts lost.
        labels: As in ``execute``.

    Raises:
        LossyCastError: Some did; all are listed.
    """
    overflowed = [loss for loss in losses if loss.overflowed]
    if overflowed:
        raise LossyCastError(
            f"{len(overflowed)} tensors hold values that the target type cannot",
            [
                ("overflow", f"{_label(loss, labels)}  {loss.overflowed} values")
                for loss in overflowed
            ],
            hint="choose a type with a wider range, such as bf16 or fp32",
        )


@dataclass(frozen=True, slots=True)
class LossyCast:
    """A tensor that a cast changed by more than rounding."""

    key: str
    overflowed: int
    underflowed: int
