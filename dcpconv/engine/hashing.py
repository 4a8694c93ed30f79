"""Digests of boxes, read in target order and hashed chunk by chunk in several threads.

Memory: three buffers of ``TILE`` bytes per thread, and 32 bytes for every chunk of the tensors
under way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

from blake3 import blake3

from dcpconv.core.outline import Fill
from dcpconv.engine.boxes import Box
from dcpconv.engine.sharing import CHUNK, Stretch, share, stretches
from dcpconv.engine.threads import Desk
from dcpconv.stores.local import Sources

_TILE = 4 << 20
"""Bytes put together at a time where runs are short, for fewer and longer reads."""


def digest_of(data: bytes) -> bytes:
    """The digest of a tensor whose bytes are at hand: of the digests of its chunks.

    Source: docs/fingerprints.md.

    >>> digest_of(b"").hex()[:16]
    'af1349b9f5f9a1a6'
    """
    chunks = range(0, len(data), CHUNK)
    return _joined(blake3(data[start : start + CHUNK]).digest() for start in chunks)


def digest_of_range(fd: int, start: int, stop: int) -> str:
    """The digest of bytes of an open file, in hexadecimal; of as many as there are."""
    hasher = blake3()
    while start < stop and (data := os.pread(fd, min(CHUNK, stop - start), start)):
        hasher.update(data)
        start += len(data)
    return str(hasher.hexdigest())


def digest_of_text(lines: Iterable[str]) -> str:
    """The digest of lines of ASCII text, in hexadecimal."""
    hasher = blake3()
    for line in lines:
        hasher.update(line.encode("ascii"))
    return str(hasher.hexdigest())


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
    done: dict[int, bytes] = {}
    parts: dict[int, dict[int, bytes]] = {}
    lock = threading.Lock()

    def hash_stretch(stretch: Stretch, desk: Desk) -> None:
        (box,) = stretch.boxes
        found = b"".join(_chunks(box, stretch, desk, sources))
        nbytes = (stretch.stop - stretch.start) * box.itemsize
        is_whole = stretch.start == 0 and stretch.stop == box.fill.numel
        with lock:
            if is_whole:
                done[stretch.number] = blake3(found).digest()
            else:
                held = parts.setdefault(stretch.number, {})
                held[stretch.start] = found
                if sum(map(len, held.values())) == 32 * _count(box):
                    joined = (held[start] for start in sorted(held))
                    done[stretch.number] = _joined(joined)
                    del parts[stretch.number]
        if progress is not None:
            progress(nbytes)

    share(
        stretches((fill,) for fill in fills),
        hash_stretch,
        jobs=jobs,
        size=_TILE,
        buffers=2,
    )
    sources.require_unchanged()
    return [done[number] for number in range(len(done))]


def _count(box: Box) -> int:
    return -(-box.fill.nbytes // CHUNK)


def _joined(digests: Iterable[bytes]) -> bytes:
    return bytes(blake3(b"".join(digests)).digest())


def _chunks(box: Box, stretch: Stretch, desk: Desk, sources: Sources) -> Iterable[bytes]:
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
            yield blake3(tile[at : at + CHUNK]).digest()
