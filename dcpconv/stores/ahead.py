"""Work whose bytes are fetched before its turn comes: ranges of many pieces of work, together.

Work is taken in windows of some megabytes.  The ranges that a window wants are coalesced
and asked for at once, several windows before any thread needs them, and are given up when the last
piece of the window is done.  Memory is bounded by what is ahead, whatever the size of the model.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from dcpconv.stores.local import Sources
from dcpconv.stores.ranged import Held, Ranged

T = TypeVar("T")

WINDOW: Final = 16 << 20
"""Bytes that are wanted together: a request of this length takes long enough for a round trip not
to count."""

AHEAD: Final = 160 << 20
"""Bytes on their way or there, that no work has used up yet.  Work under way may hold one window
more per thread."""

_MOST: Final = 4096
"""Pieces of work in a window, however few bytes they want."""

Wanted = tuple[str, int, int]
"""``(file, offset, nbytes)``."""


@dataclass(slots=True)
class _Window:
    left: int = 0
    nbytes: int = 0
    held: list[tuple[Ranged, list[Held]]] = field(default_factory=list)


class Ahead(Generic[T]):
    """An iterator over work, to be used under one lock, that fetches ahead.

    Args:
        sources: Where the files are; on this machine nothing is fetched.
        work: Pieces of work, by where their bytes are as far as that can be.
        wants: Bytes that a piece of work will read; reading others is slower, and no error.
        most: Bytes to be ahead.
    """

    def __init__(
        self,
        sources: Sources,
        work: Iterable[T],
        wants: Callable[[T], Iterable[Wanted]],
        *,
        most: int = AHEAD,
    ) -> None:
        self._sources = sources
        self._work = iter(work)
        self._wants = wants
        self._most = most
        self._ready: deque[tuple[T, _Window]] = deque()
        self._windows: dict[int, _Window] = {}
        self._ahead = 0
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._sources.is_remote:
            return next(self._work)
        # Never waits: whoever holds the lock may be the one that others have to get past.
        while self._ahead < self._most or not self._ready:
            if not self._open_window():
                break
        if not self._ready:
            raise StopIteration
        piece, window = self._ready.popleft()
        self._windows[id(piece)] = window
        return piece

    def done(self, piece: T) -> None:
        """What a piece of work has read is not needed any more."""
        window = self._windows.pop(id(piece), None)
        if window is None:
            return
        with self._lock:
            window.left -= 1
            if window.left:
                return
            self._ahead -= window.nbytes
        self._drop(window)

    def close(self) -> None:
        """Give up everything."""
        windows = {id(window): window for _, window in self._ready}
        windows |= {id(window): window for window in self._windows.values()}
        self._ready.clear()
        self._windows.clear()
        for window in windows.values():
            self._drop(window)

    def _open_window(self) -> bool:
        """Take the next pieces of work and ask for their bytes; ``False`` where none are left."""
        window, pieces = _Window(), list[T]()
        wanted: dict[str, list[tuple[int, int]]] = {}
        for piece in self._work:
            pieces.append(piece)
            for file, offset, nbytes in self._wants(piece):
                if nbytes:
                    wanted.setdefault(file, []).append((offset, nbytes))
                    window.nbytes += nbytes
            if window.nbytes >= WINDOW or len(pieces) == _MOST:
                break
        if not pieces:
            return False
        window.left = len(pieces)
        for file, ranges in wanted.items():
            ranged = self._sources.ranged(file)
            if ranged is not None:
                whole = [one for extent in ranges for one in ranged.widened(*extent)]
                window.held.append((ranged, ranged.hold(whole)))
        with self._lock:
            self._ahead += window.nbytes
        self._ready.extend((piece, window) for piece in pieces)
        return True

    @staticmethod
    def _drop(window: _Window) -> None:
        for ranged, held in window.held:
            ranged.drop(held)
