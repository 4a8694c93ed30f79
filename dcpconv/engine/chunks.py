"""The digest of a tensor: of the digests of its chunks, which may be hashed in any order.

Source: docs/fingerprints.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from blake3 import blake3

CHUNK = 1 << 20
"""Bytes of a chunk."""


def chunk_digest(data: memoryview | bytes) -> bytes:
    """The digest of one chunk."""
    return bytes(blake3(data).digest())


def joined(digests: Iterable[bytes]) -> bytes:
    """The digest of a tensor, from those of its chunks in order."""
    return bytes(blake3(b"".join(digests)).digest())


def digest_of(data: bytes) -> bytes:
    """The digest of a tensor whose bytes are at hand.

    >>> digest_of(b"").hex()[:16]
    'af1349b9f5f9a1a6'
    """
    chunks = range(0, len(data), CHUNK)
    return joined(chunk_digest(data[start : start + CHUNK]) for start in chunks)


def digest_of_range(
    fd: int, start: int, stop: int, *, take: Callable[[int, bytes], None] | None = None
) -> str:
    """The digest of bytes of an open file, in hexadecimal; of as many as there are.

    Args:
        fd: The file.
        start: First byte.
        stop: End.
        take: Called with all bytes, too, in order, and with where they lie.
    """
    hasher = blake3()
    while start < stop and (data := os.pread(fd, min(CHUNK, stop - start), start)):
        hasher.update(data)
        if take is not None:
            take(start, data)
        start += len(data)
    return str(hasher.hexdigest())


def digest_of_text(lines: Iterable[str]) -> str:
    """The digest of lines of ASCII text, in hexadecimal."""
    hasher = blake3()
    for line in lines:
        hasher.update(line.encode("ascii"))
    return str(hasher.hexdigest())
