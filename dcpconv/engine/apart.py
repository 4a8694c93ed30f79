"""Runs of one file into buffers that lie anywhere, such as the memory of as many parameters."""

from __future__ import annotations

from collections.abc import Iterable

from dcpconv.engine.boxes import JUNK, MAX_GAP, MAX_IOVECS
from dcpconv.stores.local import Sources


def read_apart(file: str, runs: Iterable[tuple[int, memoryview]], *, sources: Sources) -> None:
    """Fill buffers that lie anywhere with bytes of one file, neighbours in it together.

    Args:
        file: The file.
        runs: ``(source offset, buffer)``, forwards.
        sources: Where it is open.
    """
    begin = end = 0
    views: list[memoryview] = []
    with sources.open(file) as source:
        for offset, view in runs:
            gap = offset - end
            if views and (gap < 0 or gap > MAX_GAP or len(views) > MAX_IOVECS - 2):
                source.read(begin, views, end - begin)
                views = []
            if not views:
                begin = offset
            elif gap:
                views.append(JUNK[:gap])
            views.append(view)
            end = offset + len(view)
        if views:
            source.read(begin, views, end - begin)
