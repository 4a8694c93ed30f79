"""Files of a result that are objects of a store: assembled in parts, which are sent in order.

Units arrive from several threads and in nearly the order of the file, so a few parts are open at a
time.  A part is sent when every unit that touches it is done and none that could is still to come.
An object becomes visible when its last part is there, or not at all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dcpconv.core.errors import DcpconvError, TargetExistsError
from dcpconv.core.outline import OutFile
from dcpconv.engine.units import Unit
from dcpconv.stores.local import SourceFile
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.store import Info
from dcpconv.stores.system import System

if TYPE_CHECKING:
    from dcpconv.engine.passing import PassingDigests

PART: Final = 16 << 20
"""Bytes of a part, unless the object needs longer ones."""

_MOST_PARTS: Final = 9_000
"""Parts of an object; S3 takes 10,000.  Of 64 MiB each they hold 560 GiB."""

AT_ONCE: Final = 4
"""Parts of one object on their way."""

_ROOM: Final = 64 << 20
"""Bytes of parts that are not on their way yet, of all objects together."""

_OBJECTS: Final = 12
"""Objects that are being sent; a thread waits for each."""


_LOOK: Final = 0.2
"""Seconds between looks at whether the threads are to stop."""


def finished_first(path: RemotePath) -> TargetExistsError:
    """The error for an object that somebody else has made meanwhile."""
    return TargetExistsError(
        "another conversion finished this target first",
        [("object", path)],
        hint="what it wrote is whole; pass --overwrite to replace it",
    )


class _Stopped(Exception):  # noqa: N818  no error: it ends an upload that is not wanted any more
    pass


@dataclass(slots=True)
class _Part:
    data: bytearray | None = None
    pending: int = 0  # bytes that are announced and not there


class Uploads:
    """Everything that one conversion sends.

    Args:
        target: Prefix, or the object itself where the result is one file.
        is_file: Whether it is.
        is_held: Whether no object may become visible before ``release``: each makes the result a
            checkpoint, and is made only if nobody else has made one meanwhile.
        known: What was there before, by key.

    Attributes:
        digests: Take what passes.
    """

    def __init__(
        self,
        target: RemotePath,
        *,
        is_file: bool,
        is_held: bool,
        known: Mapping[str, Info] | None = None,
    ) -> None:
        self._target = target
        self._is_file = is_file
        self.is_held = is_held
        self.known = known or {}
        self.digests: PassingDigests | None = None
        self.condition = threading.Condition()
        self.waiting = 0
        self.sending = 0
        self.is_stopped = False
        self.halt = threading.Event()
        self._made: list[Upload] = []

    def open(self, file: OutFile) -> Upload:
        """An object to write into."""
        path = self._target if self._is_file else self._target / file.name
        made = Upload(self, path, file)
        self._made.append(made)
        return made

    def settle(self) -> None:
        """Wait until all objects are there, but for those that are held.

        Raises:
            StoreError: One could not be written.
        """
        for upload in self._made:
            if not self.is_held:
                upload.wait()

    def release(self) -> None:
        """Let objects that are held become visible, the first one last: readers look for it.

        Raises:
            StoreError: One could not be written.
        """
        for upload in reversed(self._made):
            upload.release()
            upload.wait()

    def stop(self, *, waits: bool = True) -> None:
        """Give up every object that is not there yet, and leave no part of it behind.

        Args:
            waits: Whether to wait until the parts are gone.
        """
        with self.condition:
            self.is_stopped = True
            self.condition.notify_all()
        for upload in self._made if waits else ():
            upload.join()

    @property
    def keys(self) -> list[str]:
        """Of all objects."""
        return [upload.path.key for upload in self._made]

    @property
    def made(self) -> list[str]:
        """Of all that may be there by now, and are nobody else's."""
        return [one.path.key for one in self._made if one.is_made or not self.is_held]


@dataclass(slots=True, eq=False)
class Upload:
    """An object being written; ``pending`` counts its units under way, and the listing of them.

    Attributes:
        uploads: What it belongs to.
        path: Where it will be.
        file: What is in it.
        is_made: Whether it is there.
    """

    uploads: Uploads
    path: RemotePath
    file: OutFile
    pending: int = 1
    size: int = 0
    is_made: bool = False
    _parts: dict[int, _Part] = field(default_factory=dict)
    _next: int = 0
    _listed: int = 0
    _is_ended: bool = False
    _is_released: bool = False
    _thread: threading.Thread | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None

    def __post_init__(self) -> None:
        mib = 1 << 20
        self.size = max(PART, -(-self.file.nbytes // _MOST_PARTS // mib) * mib)

    @property
    def name(self) -> str:
        return self.file.name

    def announce(self, unit: Unit) -> None:
        """A unit is about to be done; those announced later begin where it ends, or after that."""
        self.expect(unit.offset, unit.nbytes)

    def expect(self, offset: int, nbytes: int) -> None:
        """As ``announce``, of a range of bytes."""
        with self.uploads.condition:
            for number, length in self._shares(offset, nbytes):
                self._parts.setdefault(number, _Part()).pending += length
            self._listed = max(self._listed, (offset + nbytes) // self.size)
            self.uploads.condition.notify_all()

    def skip(self, unit: Unit) -> None:
        """A unit is nothing but zeros."""
        if self.uploads.digests is not None:
            self.uploads.digests.file(self.name).take_zeros(unit.offset, unit.nbytes)
        for number, length in self._shares(unit.offset, unit.nbytes):
            self._arrived(number, length)

    def _shares(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """The parts that a range touches, and the bytes of it in each."""
        while nbytes:
            number, at = divmod(offset, self.size)
            length = min(nbytes, self.size - at)
            yield number, length
            offset, nbytes = offset + length, nbytes - length

    def _arrived(self, number: int, nbytes: int) -> None:
        with self.uploads.condition:
            self._parts[number].pending -= nbytes
            self.uploads.condition.notify_all()

    def write(self, data: memoryview | bytes, offset: int, **_unused: object) -> None:
        """Put bytes where they belong, as soon as there is room.

        Raises:
            StoreError: The object cannot be written.
        """
        view = memoryview(data)
        self._digest(offset, view)
        while view:
            number, at = divmod(offset, self.size)
            buffer = self._buffer(number)
            length = min(len(view), len(buffer) - at)
            buffer[at : at + length] = view[:length]
            self._arrived(number, length)
            offset, view = offset + length, view[length:]

    def receive(self, source: SourceFile, offset: int, target: int, nbytes: int) -> None:
        """Copy a run of a source file to ``target``.

        Raises:
            StoreError: The object cannot be written, or the source cannot be read.
        """
        while nbytes:
            number, at = divmod(target, self.size)
            buffer = self._buffer(number)
            length = min(nbytes, len(buffer) - at)
            with memoryview(buffer) as view:
                source.read(offset, [view[at : at + length]], length)
                self._digest(target, view[at : at + length])
            self._arrived(number, length)
            offset, target, nbytes = offset + length, target + length, nbytes - length

    def _digest(self, offset: int, data: memoryview) -> None:
        if self.uploads.digests is not None:
            self.uploads.digests.take(self.name, offset, data)

    def write_back(self, unit: Unit, system: System) -> None:
        """Parts are sent by themselves."""

    def finish(self) -> None:
        """Every unit is done."""
        self._start()
        with self.uploads.condition:
            self._is_ended = True
            self.uploads.condition.notify_all()

    def release(self) -> None:
        """It may become visible."""
        with self.uploads.condition:
            self._is_released = True
            self.uploads.condition.notify_all()

    def join(self) -> None:
        """Wait until it is there, or given up, also after Ctrl-C has interrupted the waiting.

        In CPython 3.11 an interrupted ``Thread.join`` takes the thread for ended.
        """
        if self._thread is not None:
            self._over.wait()

    def wait(self) -> None:
        """Wait until it is there.

        Raises:
            StoreError: It could not be written.
        """
        self.join()
        self._raise()

    def _raise(self) -> None:
        if isinstance(self._error, DcpconvError):
            raise self._error
        if self._error is not None:
            raise DcpconvError(
                "the result cannot be written",
                [("object", self.path), ("because", type(self._error).__name__)],
                hint="the source is untouched",
            ) from self._error

    def _buffer(self, number: int) -> bytearray:
        """The memory of a part, once there is room for it."""
        self._start()
        uploads, part = self.uploads, self._parts[number]
        with uploads.condition:
            while part.data is None and self._error is None and not self._is_over():
                # What is due next may always be made: all else waits for it.
                if number == self._next or uploads.waiting + self.size <= _ROOM:
                    length = min(self.size, self.file.nbytes - number * self.size)
                    part.data = bytearray(length)
                    uploads.waiting += length
                else:
                    uploads.condition.wait(_LOOK)
            self._raise()
            if part.data is None:
                raise _Stopped
        return part.data

    def _is_over(self) -> bool:
        return self.uploads.is_stopped or self.uploads.halt.is_set()

    def _start(self) -> None:
        uploads = self.uploads
        with uploads.condition:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._send, name="upload", daemon=True)
            may_wait = not uploads.is_held  # what is held has an end that nobody waits for yet
            while may_wait and uploads.sending >= _OBJECTS and not self._is_over():
                uploads.condition.wait(_LOOK)
            uploads.sending += 1
            self._thread.start()

    def _send(self) -> None:
        try:
            self._put()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by whoever waits for it
            self._error = error
        finally:
            with self.uploads.condition:
                self.uploads.sending -= 1
                for part in self._parts.values():
                    self.uploads.waiting -= len(part.data or b"")
                    part.data = None
                self.uploads.condition.notify_all()
            self._over.set()

    def _put(self) -> None:
        store, key, parts = self.path.origin.store, self.path.key, self._sent()
        nbytes, part = self.file.nbytes, self.size
        if not self.uploads.is_held:
            store.put(key, parts, nbytes=nbytes, part=part, at_once=AT_ONCE)
            self.is_made = True
            return
        known = self.uploads.known.get(key)
        self.is_made = store.put_if(
            key, parts, nbytes=nbytes, part=part, at_once=AT_ONCE, replaces=known
        )
        if not self.is_made:
            raise finished_first(self.path)

    def _sent(self) -> Iterator[bytes | bytearray]:
        """Every part in its turn."""
        for number in range(-(-self.file.nbytes // self.size)):
            with self.uploads.condition:
                while not self._is_ready(number):
                    if self.uploads.is_stopped:
                        raise _Stopped
                    self.uploads.condition.wait()
                part = self._parts.pop(number, _Part())
                data = part.data
                if data is None:  # nothing but zeros
                    data = bytearray(min(self.size, self.file.nbytes - number * self.size))
                else:
                    self.uploads.waiting -= len(data)
                self._next = number + 1
                self.uploads.condition.notify_all()
            yield data
        with self.uploads.condition:
            # The end of the object makes it visible.
            while self.uploads.is_stopped or not (self._is_ended and self._may_show()):
                if self.uploads.is_stopped:
                    raise _Stopped
                self.uploads.condition.wait()

    def _may_show(self) -> bool:
        return self._is_released or not self.uploads.is_held

    def _is_ready(self, number: int) -> bool:
        part = self._parts.get(number)
        return (self._is_ended or self._listed > number) and (part is None or not part.pending)
