"""A thread that can be waited for although Ctrl-C interrupts the waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

D = TypeVar("D")

_SECONDS_TO_START = 1.0
"""How long a thread may take to say that it runs, on a machine that is very busy."""


class Worker(Generic[D]):
    """A thread that can be waited for although Ctrl-C interrupts the waiting.

    ``Thread.join`` cannot: in CPython 3.11 an interrupted ``join`` takes the thread for ended.
    """

    def __init__(self, work: Callable[[D], None], desk: D) -> None:
        self.ended = threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(work, desk), name="dcpconv", daemon=True
        )

    def _run(self, work: Callable[[D], None], desk: D) -> None:
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
