"""Ranges of objects, tried again where that helps, several at a time, a bounded number of them.

One pool of threads serves the process: they only wait for the network, and what is in flight at a
time is what bounds the memory.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from dcpconv.core.errors import SourceChangedError
from dcpconv.stores.store import Buffer, ChangedError, Info, Store, StoreError, TransientError

T = TypeVar("T")

PART: Final = 32 << 20
"""Bytes of one request at most; most are of half as many, so that several are on their way."""

GAP: Final = 512 << 10
"""Bytes between two wanted ranges that are cheaper to fetch and drop than to ask anew: what a
connection of 50 MB/s brings in 10 ms, a short round trip."""

AT_ONCE: Final = 16
"""Requests in flight, of the whole process."""

TRIES: Final = 6
"""Requests for one range, the first included."""

_FIRST_PAUSE: Final = 0.2
"""Seconds before the second try; each pause is up to twice as long as the one before it."""

_LONGEST_PAUSE: Final = 8.0

Range = tuple[int, int]
"""``(offset, nbytes)`` in an object."""

_pool: ThreadPoolExecutor | None = None
_owner = 0
_lock = threading.Lock()


def pool() -> ThreadPoolExecutor:
    """The threads that wait for the network; another pool in a process that was forked."""
    global _pool, _owner
    with _lock:
        if _pool is None or _owner != os.getpid():
            _pool, _owner = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch"), os.getpid()
        return _pool


def coalesced(ranges: Iterable[Range], *, gap: int = GAP, part: int = PART) -> Iterator[Range]:
    """Requests for ranges of one object: near ones joined, long ones cut.

    >>> [*coalesced([(0, 4), (6, 2), (100, 5)], gap=3, part=8)]
    [(0, 8), (100, 5)]
    >>> [*coalesced([(0, 20)], part=8)]
    [(0, 8), (8, 8), (16, 4)]
    """
    begin = end = -1
    for offset, nbytes in sorted(ranges):
        if begin >= 0 and offset - end <= gap:
            end = max(end, offset + nbytes)
            continue
        yield from _cut(begin, end, part)
        begin, end = offset, offset + nbytes
    yield from _cut(begin, end, part)


def _cut(begin: int, end: int, part: int) -> Iterator[Range]:
    for offset in range(begin, end, part):
        yield offset, min(part, end - offset)


def patiently(call: Callable[[], T], *, where: str, expected: str) -> T:
    """What a request answers, asked again where that may help.

    Args:
        call: Makes one request.
        where: What errors call the object.
        expected: What they say was asked for.

    Raises:
        StoreError: It cannot be had; says what was tried.
        ChangedError: The object is another one by now.
    """
    started, seen = time.monotonic(), list[str]()
    for attempt in range(TRIES):
        if attempt:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311  no secret
        try:
            return call()
        except TransientError as error:
            if error.what not in seen:
                seen.append(error.what)
    raise StoreError(
        "the store does not answer as it should",
        [
            ("object", where),
            ("expected", expected),
            ("tried", f"{TRIES} times in {time.monotonic() - started:.0f} s"),
            *(("answer", what) for what in seen),
        ],
        hint="is the endpoint right? run this again when the store answers",
    )


def fetch(store: Store, key: str, offset: int, nbytes: int, info: Info) -> memoryview:
    """Bytes of an object at the version listed.

    Raises:
        StoreError: They cannot be had; says what was tried.
        SourceChangedError: The object is another one by now.
    """
    if nbytes <= 0:
        return memoryview(b"")
    try:
        return patiently(
            lambda: _whole(store.get(key, offset, nbytes, info), nbytes),
            where=store.where(key),
            expected=f"{nbytes:,} bytes from byte {offset:,}",
        )
    except ChangedError:
        raise changed([store.where(key)]) from None


def changed(objects: Iterable[str]) -> SourceChangedError:
    """The error for objects that are not what was listed any more."""
    return SourceChangedError(
        "the source changed while it was being read",
        [("changed", f"{name}: another object has its name") for name in objects],
        hint="run this again once nothing writes to it",
    )


def _whole(data: Buffer, nbytes: int) -> memoryview:
    view = memoryview(data)
    view = view if view.format == "B" else view.cast("B")
    if len(view) != nbytes:
        raise TransientError(f"{len(view):,} bytes instead of {nbytes:,}")
    return view


def submit(store: Store, key: str, piece: Range, info: Info) -> Future[memoryview]:
    """The same, in another thread."""
    return pool().submit(fetch, store, key, *piece, info)
