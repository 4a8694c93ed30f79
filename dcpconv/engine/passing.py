"""Digests of the tensors of a result, taken from its bytes on their way through buffers.

A chunk of a tensor is hashed in the buffers that its bytes pass through, as long as they come in
order, and is put together otherwise.  What no buffer sees, and what there is no room to put
together, is read from the result afterwards.

Memory: ``ROOM`` bytes for chunks that are not whole yet, and 32 bytes for every chunk of the
tensors under way.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from blake3 import blake3

from dcpconv.core.outline import Fill, Part
from dcpconv.engine.boxes import restrict
from dcpconv.engine.chunks import CHUNK, chunk_digest, joined
from dcpconv.engine.spans import assign_runs
from dcpconv.stores.local import SourceFile

ROOM = 32 << 20
"""Bytes for chunks that are under way at one time: a few for every thread, and one wherever a file
ends inside a chunk that goes on in another."""

_STATE = 4 << 10
"""Bytes that the hash of half a chunk takes, about."""

_SPARES = 8
"""Buffers of whole chunks that are kept for the next ones."""

_ZEROS = memoryview(bytes(CHUNK))


@dataclass(slots=True)
class _Index:
    """What lies in one file, by its first byte: ``(number of the tensor, first byte, part)``, the
    part turned round, from the elements of the file to those of the tensor."""

    parts: list[tuple[int, int, Part]]
    starts: list[int]
    ends: list[int]


@dataclass(slots=True)
class _Open:
    """A chunk under way: so many of its first bytes are hashed, and so many others are placed."""

    hasher: blake3 = field(default_factory=blake3)
    lock: threading.Lock = field(default_factory=threading.Lock)
    data: bytearray | None = None
    hashed: int = 0
    placed: int = 0


@dataclass(frozen=True, slots=True)
class FileDigests:
    """What passes on its way into one file.

    Attributes:
        of: All digests.
        name: The file, as parts name it.
    """

    of: PassingDigests
    name: str

    def take(self, offset: int, data: memoryview | bytes) -> None:
        """Bytes of the file; none may be given twice.

        Args:
            offset: Where in the file they go.
            data: The bytes; not used after the call.
        """
        self.of.take(self.name, offset, memoryview(data))

    def take_zeros(self, offset: int, nbytes: int) -> None:
        """The same where nothing is written, so that the file has zeros there."""
        for start in range(0, nbytes, CHUNK):
            self.take(offset + start, _ZEROS[: min(CHUNK, nbytes - start)])

    def take_from(
        self, source: SourceFile, source_offset: int, offset: int, nbytes: int, buffer: memoryview
    ) -> None:
        """The same where they came without passing through a buffer: they are read."""
        for start in range(0, nbytes, len(buffer)):
            view = buffer[: min(len(buffer), nbytes - start)]
            source.read(source_offset + start, [view], len(view))
            self.take(offset + start, view)
        self.of.count(nbytes)


class PassingDigests:
    """The digest of every tensor of a result.

    Args:
        fills: What each consists of, in the files of the result.

    Attributes:
        nbytes: Bytes that were read for the digests alone.
    """

    def __init__(self, fills: Iterable[Fill]) -> None:
        self.nbytes = 0
        self._fills = list(fills)
        self._files = _indexed(self._fills)
        self._lock = threading.Lock()
        self._held = 0
        self._open: dict[tuple[int, int], _Open] = {}
        self._lost: set[tuple[int, int]] = set()
        self._spare: list[bytearray] = []
        self._parts: dict[int, dict[int, bytes]] = {}
        self._done: dict[int, bytes] = {
            number: joined(()) for number, fill in enumerate(self._fills) if not fill.numel
        }

    def file(self, name: str) -> FileDigests:
        """What takes the bytes of one file."""
        return FileDigests(self, name)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to be read."""
        return len(self._done) == len(self._fills)

    def count(self, nbytes: int) -> None:
        """Count bytes that were read for the digests alone."""
        with self._lock:
            self.nbytes += nbytes

    def take(self, file: str, offset: int, data: memoryview) -> None:
        """See ``FileDigests.take``."""
        index = self._files.get(file)
        if index is None:
            return
        end = offset + len(data)
        for number, start, part in index.parts[
            bisect_right(index.ends, offset) : bisect_left(index.starts, end)
        ]:
            itemsize = self._fills[number].source_dtype.itemsize
            # An element that is cut belongs to neither side: its chunk is read afterwards.
            low, high = max(0, -((start - offset) // itemsize)), (end - start) // itemsize
            for nest in restrict(part, low, high, itemsize=itemsize):
                at = start + nest.target * itemsize - offset
                if nest.is_contiguous:
                    self._take_run(number, nest.offset, data[at : at + nest.numel * itemsize])
                else:
                    self._take_nest(number, itemsize, nest, data[at:])

    def _take_run(self, number: int, begin: int, data: memoryview) -> None:
        """Bytes of a tensor that follow each other in it, too."""
        end = begin + len(data)
        for at in range(begin // CHUNK * CHUNK, end, CHUNK):
            first, last = max(begin, at), min(end, at + CHUNK)
            view = data[first - begin : last - begin]
            if len(view) == self._length(number, at):
                self.found(number, at // CHUNK, chunk_digest(view))
            elif (chunk := self._chunk(number, at)) is not None:
                with chunk.lock:
                    if chunk.data is None and chunk.hashed == first - at:
                        chunk.hasher.update(view)
                        chunk.hashed += len(view)
                    elif (room := self._room_in(number, at, chunk)) is not None:
                        room[first - at : last - at] = view
                        chunk.placed += len(view)
                    self._look_at(number, at, chunk)

    def _take_nest(self, number: int, itemsize: int, nest: Part, source: memoryview) -> None:
        """Bytes that lie elsewhere in the tensor, from the first of them on."""
        loops = tuple((count, step, target) for count, target, step in nest.loops)
        part = Part("", 0, nest.offset // itemsize, loops)
        end = nest.offset + itemsize * (1 + sum((n - 1) * step for n, _, step in loops))
        for at in range(nest.offset // CHUNK * CHUNK, end, CHUNK):
            first = at // itemsize
            pieces = restrict(part, first, first + CHUNK // itemsize, itemsize=itemsize)
            if not pieces or (chunk := self._chunk(number, at)) is None:
                continue
            with chunk.lock:
                if (room := self._room_in(number, at, chunk)) is None:
                    continue
                for piece in pieces:
                    reach = itemsize * (1 + sum((n - 1) * step for n, step, _ in piece.loops))
                    view = source[piece.offset : piece.offset + reach]
                    place = room[(piece.target - first) * itemsize :]
                    if piece.is_contiguous:
                        place[:reach] = view
                    else:
                        assign_runs(piece.loops, itemsize, view, place)
                chunk.placed += itemsize * sum(piece.numel for piece in pieces)
                self._look_at(number, at, chunk)

    def _length(self, number: int, at: int) -> int:
        return min(CHUNK, self._fills[number].nbytes - at)

    def _chunk(self, number: int, at: int) -> _Open | None:
        """A chunk that is not whole; ``None`` where there was no room for it."""
        key = number, at
        with self._lock:
            found = self._open.get(key)
            if found is None and key not in self._lost:
                if self._held + _STATE > ROOM:
                    self._lost.add(key)
                    return None
                self._held += _STATE
                found = self._open[key] = _Open()
            return found

    def _room_in(self, number: int, at: int, chunk: _Open) -> memoryview | None:
        """Where bytes of a chunk are placed; ``None`` where there is no room: it is lost."""
        length = self._length(number, at)
        with self._lock:
            if (number, at) in self._lost:
                return None
            if chunk.data is None:
                if self._held + length > ROOM:
                    self._lost.add((number, at))
                    del self._open[number, at]
                    self._held -= _STATE
                    return None
                self._held += length
                chunk.data = self._spare.pop() if length == CHUNK and self._spare else None
        if chunk.data is None:
            chunk.data = bytearray(length)
        return memoryview(chunk.data)

    def _look_at(self, number: int, at: int, chunk: _Open) -> None:
        """Take the digest of a chunk that is whole now."""
        length = self._length(number, at)
        if chunk.hashed + chunk.placed < length:
            return
        if chunk.data is not None:
            chunk.hasher.update(memoryview(chunk.data)[chunk.hashed :])
        self.found(number, at // CHUNK, chunk.hasher.digest())
        with self._lock:
            del self._open[number, at]
            self._held -= _STATE
            if chunk.data is not None:
                self._held -= length
                if length == CHUNK and len(self._spare) < _SPARES:
                    self._spare.append(chunk.data)

    def found(self, number: int, chunk: int, digest: bytes) -> None:
        """Take the digest of a chunk."""
        count = _count(self._fills[number])
        with self._lock:
            held = self._parts.setdefault(number, {})
            held[chunk] = digest
            if len(held) == count:
                self._done[number] = joined(held[at] for at in range(count))
                del self._parts[number]

    def left(self) -> Iterator[tuple[int, Fill, list[int]]]:
        """Every tensor that is not known, by number, with those of its chunks that are not."""
        self._open.clear()
        self._spare.clear()
        for number, fill in enumerate(self._fills):
            with self._lock:
                if number in self._done:
                    continue
                known = self._parts.get(number, {})
                chunks = [chunk for chunk in range(_count(fill)) if chunk not in known]
            yield number, fill, chunks

    def digests(self) -> list[bytes]:
        """Of every tensor, once all are known."""
        return [self._done[number] for number in range(len(self._fills))]


def _count(fill: Fill) -> int:
    return -(-fill.nbytes // CHUNK)


def _indexed(fills: Sequence[Fill]) -> dict[str, _Index]:
    """Every part of all fills by its file."""
    found: dict[str, list[tuple[int, int, Part]]] = {}
    for number, fill in enumerate(fills):
        itemsize = fill.source_dtype.itemsize
        for part in fill.parts:
            if part.half or any(min(loop) < 1 for loop in part.loops):
                continue
            loops = tuple((count, target, step) for count, step, target in part.loops)
            turned = Part(part.file, part.target * itemsize, 0, loops)
            found.setdefault(part.file, []).append((number, part.offset, turned))
    return {file: _index(fills, parts) for file, parts in found.items()}


def _index(fills: Sequence[Fill], parts: list[tuple[int, int, Part]]) -> _Index:
    parts.sort(key=lambda item: item[:2][::-1])
    ends = (
        start
        + fills[number].source_dtype.itemsize
        * (1 + sum((count - 1) * step for count, _, step in part.loops))
        for number, start, part in parts
    )
    return _Index(parts, [start for _, start, _ in parts], list(accumulate(ends, max)))
