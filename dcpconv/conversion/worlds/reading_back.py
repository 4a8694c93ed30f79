"""Digests of the pieces that ranks have written, compared before the result becomes visible.

The rank that wrote a piece reads it where it has written it; the one that publishes reads it again,
as its own host sees it.  What a file server has lost, or put elsewhere, differs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dcpconv.core.errors import DcpconvError
from dcpconv.core.outline import Outline
from dcpconv.engine.chunks import digest_of_range
from dcpconv.engine.cutting import OutPiece
from dcpconv.engine.passing import PassingDigests


def digests_of(
    outline: Outline, pieces: Sequence[OutPiece], indices: Sequence[int], directory: int
) -> dict[str, str]:
    """Digests of some pieces as they lie on disk, by index.

    Args:
        outline: The result.
        pieces: All of them.
        indices: Of those to read.
        directory: The result, open.
    """
    return {str(index): _digest(outline, pieces[index], directory) for index in indices}


def require_digests(
    outline: Outline,
    pieces: Sequence[OutPiece],
    by_rank: Sequence[Mapping[str, str]],
    result: Path,
    *,
    jobs: int | None,
    taking: PassingDigests | None = None,
) -> None:
    """Refuse a result of which a piece is not what the rank that wrote it has read.

    Args:
        outline: The result.
        pieces: All of them.
        by_rank: Digests by index, first of an earlier run, then of every rank.
        result: Where it lies.
        jobs: Threads.
        taking: Take what is read for digests of tensors too.

    Raises:
        DcpconvError: Some differ; all are listed.
    """
    expected = {int(index): digest for some in by_rank for index, digest in some.items()}
    wrote = {int(index): rank - 1 for rank, some in enumerate(by_rank) for index in some}
    directory = os.open(result, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with ThreadPoolExecutor(max(1, jobs or min(4, os.cpu_count() or 1))) as pool:
            found = pool.map(
                lambda index: _digest(outline, pieces[index], directory, taking), expected
            )
            wrong = [
                index
                for index, digest in zip(expected, found, strict=True)
                if digest != expected[index]
            ]
    finally:
        os.close(directory)
    if wrong:
        raise DcpconvError(
            "what was written to the result does not read back the same",
            [("piece", _told(outline, pieces[index], wrote[index])) for index in wrong],
            hint="look after the disk or its server, and run the same again",
        )


def _digest(
    outline: Outline, piece: OutPiece, directory: int, taking: PassingDigests | None = None
) -> str:
    name = outline.files[piece.file].name
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        if taking is None:
            return digest_of_range(fd, piece.start, piece.stop)
        taking.count(piece.payload)
        return digest_of_range(fd, piece.start, piece.stop, take=taking.file(name).take)
    finally:
        os.close(fd)


def _told(outline: Outline, piece: OutPiece, rank: int) -> str:
    who = f"rank {rank}" if rank >= 0 else "an earlier run"
    return f"{outline.files[piece.file].name}: bytes {piece.start:,} to {piece.stop:,}, {who}"
