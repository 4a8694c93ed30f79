"""Work on boxes, shared out to threads in stretches: what comparing and hashing have in common."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dcpconv.core.outline import Fill
from dcpconv.engine.boxes import Box
from dcpconv.engine.desks import Desk, Pool, at_desks

STRETCH = 8 << 20  # whole chunks of a digest
"""Bytes of a tensor that a thread takes at a time: no thread is left alone with a huge one, and a
disk is read forwards."""


class Stretch(NamedTuple):
    """Elements ``start`` to ``stop`` of the boxes that hold one tensor on every side."""

    number: int
    boxes: tuple[Box, ...]
    start: int
    stop: int


def stretches(tensors: Iterable[tuple[Fill, ...]]) -> Iterator[Stretch]:
    """Every tensor in stretches whose borders are those of chunks, one at least.

    Args:
        tensors: Its fill on every side, all of as many elements.
    """
    for number, fills in enumerate(tensors):
        yield from stretches_of(number, fills, 0, fills[0].numel)


def stretches_of(number: int, fills: tuple[Fill, ...], first: int, stop: int) -> Iterator[Stretch]:
    """Elements ``first`` to ``stop`` of one tensor in stretches, one at least."""
    boxes = tuple(map(Box, fills))
    step = STRETCH // max(box.itemsize for box in boxes)
    for start in range(first, max(first + 1, stop), step):
        yield Stretch(number, boxes, start, min(start + step, stop))


def share(
    work: Iterable[Stretch],
    do: Callable[[Stretch, Desk], None],
    *,
    jobs: int | None,
    size: int,
    buffers: int,
) -> None:
    """Do all work in threads; raises the first error once every thread has stopped.

    Args:
        work: Taken one by one, so that a plan of many boxes is never whole in memory.
        do: Called from the threads with a desk that nobody else uses.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        size: Bytes of each buffer of a desk.
        buffers: How many buffers ``do`` uses at most.
    """
    threads = max(1, jobs or min(4, os.cpu_count() or 1))
    left = iter(work)
    lock = threading.Lock()
    stop = threading.Event()
    errors: list[BaseException] = []

    def loop(desk: Desk) -> None:
        try:
            while not stop.is_set():
                with lock:
                    stretch = next(left, None)
                if stretch is None:
                    return
                do(stretch, desk)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)
            stop.set()
        finally:
            desk.clear()

    pool = Pool(threads * size * buffers)
    at_desks([Desk(pool, size) for _ in range(threads)], loop, stop=stop)
    if errors:
        raise errors[0]
