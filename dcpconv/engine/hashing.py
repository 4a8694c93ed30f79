"""Digests of boxes, read in target order and hashed chunk by chunk in several threads.

Memory: three buffers of ``_TILE`` bytes per thread, and 32 bytes for every chunk of the tensors
under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcpconv.core.outline import Fill
from dcpconv.engine.boxes import Box
from dcpconv.engine.chunks import CHUNK, chunk_digest, joined
from dcpconv.engine.desks import Desk
from dcpconv.engine.sharing import STRETCH, Stretch, share, stretches
from dcpconv.stores.local import Sources

if TYPE_CHECKING:
    from dcpconv.engine.passing import PassingDigests

_TILE = 4 << 20
"""Bytes put together at a time where runs are short, for fewer and longer reads."""


def digests(
    fills: Iterable[Fill],
    *,
    sources: Sources,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[bytes]:
    """The digest of every box, in order; 32 bytes each.

    Args:
        fills: What each consists of, stored bytes alone; taken one by one.
        sources: Where the parts' files are open.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        progress: Called from the threads with bytes hashed since its last call.

    Raises:
        FormatError: A source file is missing, unreadable or too short.
        SourceChangedError: A source file changed after it was planned with.
    """
    found = Digests()
    work = stretches((fill,) for fill in fills)
    hash_all(work, into=found, sources=sources, jobs=jobs, progress=progress)
    return found.in_order()


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of tensors, as their chunks become known.

    Attributes:
        whole: Of tensors of which every chunk is known, by number.
        parts: Of the others, those of the chunks from an element on, by number and that element.
    """

    whole: dict[int, bytes] = field(default_factory=dict)
    parts: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def take(self, number: int, start: int, chunks: bytes, *, count: int) -> None:
        """Add neighbouring chunks.

        Args:
            number: Of the tensor.
            start: Element with which the first of them begins.
            chunks: Their digests.
            count: Chunks of the whole tensor.
        """
        held = self.parts.setdefault(number, {})
        held[start] = chunks
        if sum(map(len, held.values())) == 32 * count:
            self.whole[number] = joined(held[start] for start in sorted(held))
            del self.parts[number]

    def in_order(self) -> list[bytes]:
        """The digest of every tensor, once all are known."""
        return [self.whole[number] for number in range(len(self.whole))]


def hash_all(
    work: Iterable[Stretch],
    *,
    into: Digests,
    sources: Sources,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read and hash stretches of tensors; the rest as for ``digests``.

    Args:
        work: Of one tensor those that are neighbours follow each other.
        into: Gets what is found.
        sources: Where the parts' files are open.
        jobs: Threads.
        progress: Called from the threads with bytes hashed since its last call.
    """
    lock = threading.Lock()

    def hash_stretch(stretch: Stretch, desk: Desk) -> None:
        (box,) = stretch.boxes
        found = b"".join(_chunk_digests(box, stretch, desk, sources))
        with lock:
            into.take(stretch.number, stretch.start, found, count=count_of(box.fill.nbytes))
        if progress is not None:
            progress((stretch.stop - stretch.start) * box.itemsize)

    share(work, hash_stretch, jobs=jobs, size=_TILE, buffers=2)
    sources.require_unchanged()


def finished(passing: PassingDigests, *, sources: Sources, jobs: int | None = None) -> list[bytes]:
    """The digest of every tensor of a result that is written, in order; what did not pass is read.

    Args:
        passing: What took the bytes that passed.
        sources: The files of the result, open.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.

    Raises:
        FormatError: A file is missing, unreadable or too short.
    """

    def hash_stretch(stretch: Stretch, desk: Desk) -> None:
        (box,) = stretch.boxes
        first = stretch.start * box.itemsize // CHUNK
        for chunk, digest in enumerate(_chunk_digests(box, stretch, desk, sources), first):
            passing.found(stretch.number, chunk, digest)
        passing.count((stretch.stop - stretch.start) * box.itemsize)

    share(_left(passing), hash_stretch, jobs=jobs, size=_TILE, buffers=2)
    return passing.digests()


def _left(passing: PassingDigests) -> Iterator[Stretch]:
    """Every chunk that did not pass, neighbours together."""
    for number, fill, chunks in passing.left():
        box = Box(fill)
        length = CHUNK // box.itemsize
        held: list[int] = []
        for chunk in chunks:
            if held and (chunk != held[-1] + 1 or len(held) * CHUNK >= STRETCH):
                yield _stretch(number, box, held, length)
                held = []
            held.append(chunk)
        if held:
            yield _stretch(number, box, held, length)


def _stretch(number: int, box: Box, chunks: list[int], length: int) -> Stretch:
    stop = min((chunks[-1] + 1) * length, box.fill.numel)
    return Stretch(number, (box,), chunks[0] * length, stop)


def count_of(nbytes: int) -> int:
    """Chunks of a tensor."""
    return -(-nbytes // CHUNK)


def _chunk_digests(box: Box, stretch: Stretch, desk: Desk, sources: Sources) -> Iterable[bytes]:
    """The digests of all chunks of a stretch, read with a desk of two buffers of ``_TILE``."""
    itemsize = box.itemsize
    step = (_TILE if box.is_fragmented else CHUNK) // itemsize
    for start in range(stretch.start, stretch.stop, step):
        stop = min(start + step, stretch.stop)
        tile = desk.tile[: (stop - start) * itemsize]
        box.read(
            start,
            stop,
            sources=sources,
            into=tile,
            scratch=lambda: desk.scratch,
            slices=desk.slices,
        )
        for at in range(0, len(tile), CHUNK):
            yield chunk_digest(tile[at : at + CHUNK])
