"""One object of a store, read by ranges: what is on its way already is waited for, not asked again.

Two kinds of reads meet here.  Parsers ask for a few bytes at a time, and are answered from pages.
Plans say ahead what they will want, and hold it until they have taken it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from dcpconv.stores.fetching import GAP, PART, Range, coalesced, fetch, submit
from dcpconv.stores.store import Info, Store

PAGE: Final = 64 << 10
"""Bytes that a parser's read fetches at least: the header of most files, or the directory of an
archive, in one round trip."""

_PAGES: Final = 32
"""Pages kept of an object."""

_LARGEST_PAGE: Final = 4 * PAGE
"""Bytes; what is longer is read once."""


@dataclass(slots=True)
class Heading:
    """Bytes before a payload that nobody has looked at yet, because a round trip for each would
    take longer than all the rest; they are checked when the payload is read.

    Attributes:
        offset: Where they begin; the payload begins where they end.
        nbytes: How many they are.
        check: Raises what is wrong with them; can be pickled.
    """

    offset: int
    nbytes: int
    check: Callable[[bytes], None]
    is_sound: bool = False


@dataclass(slots=True)
class Held:
    """A range that is on its way, or there.

    Attributes:
        offset: Its first byte.
        nbytes: Its length.
        data: What has been or will be fetched.
    """

    offset: int
    nbytes: int
    data: Future[memoryview]


@dataclass(slots=True)
class Ranged:
    """An object at the version that was listed.

    Attributes:
        store: Where it is.
        key: Its name there.
        info: What was listed.
    """

    store: Store
    key: str
    info: Info
    _pages: list[tuple[int, memoryview]] = field(default_factory=list)
    _held: list[Held] = field(default_factory=list)
    _headings: list[Heading] = field(default_factory=list)
    _is_sorted: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, offset: int, nbytes: int) -> bytes:
        """A few bytes, fewer only at the end of the object."""
        nbytes = max(0, min(nbytes, self.info.nbytes - offset))
        if not nbytes:
            return b""
        with self._lock:
            for begin, page in reversed(self._pages):
                if begin <= offset and offset + nbytes <= begin + len(page):
                    return bytes(page[offset - begin : offset - begin + nbytes])
        # Near the end a page reaches back: what is read from there is read backwards.
        begin = max(0, min(offset, self.info.nbytes - PAGE))
        end = min(self.info.nbytes, max(begin + PAGE, offset + nbytes))
        data = b"".join(self._pieces(begin, end - begin))
        if len(data) <= _LARGEST_PAGE:
            self._keep(begin, memoryview(data))
        return data[offset - begin : offset - begin + nbytes]

    def _keep(self, offset: int, page: memoryview) -> None:
        with self._lock:
            self._pages = [*self._pages[1 - _PAGES :], (offset, page)]

    def expect(self, heading: Heading) -> None:
        """Have what stands before a payload checked when that is read."""
        with self._lock:
            self._headings.append(heading)
            self._is_sorted = False

    @property
    def headings(self) -> tuple[Heading, ...]:
        """What is to be checked."""
        return tuple(self._headings)

    def widened(self, offset: int, nbytes: int) -> list[Range]:
        """The ranges to fetch for the payloads in one, and for the headings before them."""
        headings = [one for one in self._headings_of(offset, nbytes) if not one.is_sound]
        return [(offset, nbytes), *((heading.offset, heading.nbytes) for heading in headings)]

    def hold(self, ranges: Iterable[Range]) -> list[Held]:
        """Begin to fetch ranges; they stay until they are dropped."""
        held = [
            Held(*piece, submit(self.store, self.key, piece, self.info))
            for piece in coalesced(ranges)
        ]
        with self._lock:
            for one in held:
                insort(self._held, one, key=lambda held: held.offset)
        return held

    def drop(self, held: Iterable[Held]) -> None:
        """What was held is not needed any more."""
        gone = {id(one) for one in held}
        with self._lock:
            dropped = [one for one in self._held if id(one) in gone]
            self._held = [one for one in self._held if id(one) not in gone]
        for one in dropped:
            one.data.cancel()

    def fill(self, offset: int, views: list[memoryview], nbytes: int) -> None:
        """Fill all views, ``nbytes`` together, with the bytes from ``offset`` on.

        Raises:
            StoreError: They cannot be had.
            SourceChangedError: The object is another one by now.
            FormatError: What stands before a payload is not what it should be.
        """
        for heading in self._headings_of(offset, nbytes):
            if not heading.is_sound:
                heading.check(b"".join(self._pieces(heading.offset, heading.nbytes)))
                heading.is_sound = True
        if nbytes <= PAGE and not self._is_held(offset):
            pieces = [memoryview(self.read(offset, nbytes))]  # factors and the like come in pages
        else:
            pieces = self._pieces(offset, nbytes)
        ahead = iter(views)
        view = next(ahead, memoryview(b""))
        for piece in pieces:
            while piece:
                while not view:
                    view = next(ahead)
                length = min(len(view), len(piece))
                view[:length] = piece[:length]
                view, piece = view[length:], piece[length:]  # noqa: PLW2901  the rest of it

    def _is_held(self, offset: int) -> bool:
        with self._lock:
            at = bisect_right(self._held, offset, key=lambda held: held.offset)
            return at > 0 and offset < self._held[at - 1].offset + self._held[at - 1].nbytes

    def _headings_of(self, offset: int, nbytes: int) -> list[Heading]:
        """Those whose payloads a range touches."""
        if not self._headings:
            return []
        with self._lock:
            if not self._is_sorted:
                self._headings.sort(key=lambda heading: heading.offset)
                self._is_sorted = True

        def end(heading: Heading) -> int:
            return heading.offset + heading.nbytes

        first = bisect_right(self._headings, offset, key=end) - 1
        last = bisect_right(self._headings, offset + nbytes - 1, key=end)
        return self._headings[max(0, first) : last]

    def _pieces(self, offset: int, nbytes: int) -> list[memoryview]:
        """The bytes of a range, in order, from what is held or else from the store."""
        end = offset + nbytes
        with self._lock:
            at = bisect_right(self._held, offset, key=lambda held: held.offset)
            held = self._held[max(0, at - 1) :]
        found: list[memoryview | Future[memoryview]] = []
        for one in held:
            if offset >= end or one.offset > offset:
                break
            if one.offset + one.nbytes > offset:
                stop = min(end, one.offset + one.nbytes)
                data = one.data.result()
                found.append(data[offset - one.offset : stop - one.offset])
                offset = stop
        rest = [*coalesced([(offset, end - offset)])] if offset < end else []
        if len(rest) == 1:
            found.append(fetch(self.store, self.key, *rest[0], self.info))
        else:
            found += [submit(self.store, self.key, piece, self.info) for piece in rest]
        return [one.result() if isinstance(one, Future) else one for one in found]


__all__ = ["GAP", "PAGE", "PART", "Heading", "Held", "Ranged"]
