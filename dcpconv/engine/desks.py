"""Threads with buffers of their own, which are waited for whatever happens."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from dcpconv.engine.boxes import Slices

_SECONDS_TO_START = 1.0
"""How long a thread may take to say that it runs, on a machine that is very busy."""


@dataclass(slots=True)
class Tally:
    """Bytes moved so far, by how; one per thread, so that counting needs no lock."""

    reflinked: int = 0
    copied: int = 0
    buffered: int = 0
    relabelled: int = 0
    cast: int = 0
    merged: int = 0
    holes: int = 0

    def add(self, other: Tally) -> None:
        """Add another thread's counts."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Pool:
    """Memory for buffers, counted against a budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.in_flight = 0
        self.peak = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> memoryview:
        """Memory that counts until it is given back."""
        with self._lock:
            if self.in_flight + nbytes > self.budget:
                raise AssertionError(f"{self.in_flight} + {nbytes} bytes exceed {self.budget}")
            self.in_flight += nbytes
            self.peak = max(self.peak, self.in_flight)
        return memoryview(mmap.mmap(-1, nbytes))  # costs only what is touched

    def give(self, view: memoryview | None) -> None:
        """Stop counting ``view``; it may be used no more."""
        with self._lock:
            self.in_flight -= 0 if view is None else len(view)


@dataclass(slots=True)
class Desk:
    """What one thread works with: three buffers of ``size`` bytes, each made when first used, and
    the counts of what it moved.

    Attributes:
        pool: Where the buffers come from.
        size: Bytes of each buffer.
        tally: Bytes moved.
        losses: ``(overflowed, underflowed)`` by file name and offset of the payload.
    """

    pool: Pool
    size: int
    tally: Tally = field(default_factory=Tally)
    losses: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    _tile: memoryview | None = None
    _slices: Slices | None = None
    _scratch: memoryview | None = None
    _output: memoryview | None = None

    @property
    def tile(self) -> memoryview:
        self._tile = self._tile or self.pool.take(self.size)
        return self._tile

    @property
    def slices(self) -> Slices:
        """Slices of ``tile``."""
        self._slices = self._slices or Slices(self.tile)
        return self._slices

    @property
    def scratch(self) -> memoryview:
        self._scratch = self._scratch or self.pool.take(self.size)
        return self._scratch

    @property
    def output(self) -> memoryview:
        self._output = self._output or self.pool.take(self.size)
        return self._output

    def clear(self) -> None:
        self._slices = None
        for view in (self._tile, self._scratch, self._output):
            self.pool.give(view)


class _Worker:
    """A thread that can be waited for although Ctrl-C interrupts the waiting.

    ``Thread.join`` cannot: in CPython 3.11 an interrupted ``join`` takes the thread for ended.
    """

    def __init__(self, work: Callable[[Desk], None], desk: Desk) -> None:
        self.ended = threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(work, desk), name="dcpconv", daemon=True
        )

    def _run(self, work: Callable[[Desk], None], desk: Desk) -> None:
        try:
            work(desk)
        finally:
            self.ended.set()

    def join(self) -> None:
        """Wait for the end of a thread whose ``start`` may have been interrupted.

        Ctrl-C can arrive when the thread exists but has not said so yet.
        """
        deadline = time.monotonic() + _SECONDS_TO_START
        while self.thread.ident is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if self.thread.ident is not None:
            self.ended.wait()
            self.thread.join()


def at_desks(desks: Sequence[Desk], work: Callable[[Desk], None], *, stop: threading.Event) -> None:
    """Run ``work`` in one thread per desk until all have ended.

    Args:
        desks: One per thread.
        work: Ends when there is nothing left to do, or soon after ``stop`` is set.
        stop: Set when the waiting ends or is interrupted; the threads are waited for all the same.
    """
    workers = [_Worker(work, desk) for desk in desks]
    started: list[_Worker] = []
    try:
        for worker in workers:
            started.append(worker)
            worker.thread.start()
        for worker in workers:
            worker.ended.wait()
    finally:
        stop.set()
        for worker in started:
            worker.join()
