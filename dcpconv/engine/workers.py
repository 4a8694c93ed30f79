"""A thread that can be waited for, whatever interrupts the waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

_SECONDS_TO_START: Final = 1.0
"""How long a thread may take to say that it runs, on a machine that is very busy."""


class Worker:
    """A thread that can be waited for although Ctrl-C interrupts the waiting.

    ``Thread.join`` cannot: in CPython 3.11 an interrupted ``join`` takes the thread for ended, and
    every later one returns at once.

    Args:
        work: What it does.
        name: What a traceback calls it.

    Attributes:
        ended: Set when the work is done.
    """

    def __init__(self, work: Callable[[], None], *, name: str) -> None:
        self.ended = threading.Event()
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self.ended.set()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of a thread whose ``start`` may have been interrupted.

        Ctrl-C can arrive when the thread exists but has not said so yet.
        """
        deadline = time.monotonic() + _SECONDS_TO_START
        while self._thread.ident is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._thread.ident is not None:
            self.ended.wait()
            self._thread.join()
