"""A path in a store: everything that reads checkpoints takes one for a path of this machine.

A ``RemotePath`` answers what a ``Path`` is asked (is it a file, what is in it, how long is it) from
what its store has listed; opened, it is read by ranges.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Generator, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PosixPath, PurePath
from typing import IO, TYPE_CHECKING, Any, Final

from dcpconv.core.catalog import Identity
from dcpconv.core.errors import DcpconvError, FormatError

if TYPE_CHECKING:
    from typing_extensions import Self

    from dcpconv.stores.ranged import Heading, Ranged
    from dcpconv.stores.store import Info, Store, Told

# What reads from stores is imported when the first of them is named.

_LARGEST_WHOLE: Final = 1 << 31
"""Bytes of an object that is read whole; data is read by ranges."""


class Origin:
    """A store, and the objects of it that are being read.

    Args:
        store: Where the bytes are.
        reopen: Finds the path of a URL, in another process.
        url: What it was opened by.
    """

    def __init__(self, store: Store, reopen: Callable[[str], Path], url: str = "") -> None:
        self.store = store
        self.reopen = reopen
        self.url = url
        self._ranged: dict[str, Ranged] = {}

    def ranged(self, key: str) -> Ranged:
        """An object to read.

        Raises:
            FileNotFoundError: There is none.
        """
        found = self._ranged.get(key)
        if found is None:
            info = self.store.info(key)
            if info is None:
                raise FileNotFoundError(2, "there is no such object", self.store.where(key))
            from dcpconv.stores.ranged import Ranged  # noqa: PLC0415

            found = self._ranged.setdefault(key, Ranged(self.store, key, info))
        return found

    def told(self) -> tuple[Callable[..., Origin], tuple[Any, ...]]:
        """As ``__reduce__``: the same in another process, which asks for nothing that is known
        here, reads the versions that were listed here, and checks what is to be checked."""
        headings = {key: one.headings for key, one in self._ranged.items() if one.headings}
        # A short name of a hub's could be a path of the other process's host.
        url = self.url if "://" in self.url else self.store.address("")
        return _reopened, (self.reopen, url, self.store.told(), headings)


def _reopened(
    reopen: Callable[[str], RemotePath],
    url: str,
    told: Told,
    headings: Mapping[str, Iterable[Heading]],
) -> Origin:
    origin = reopen(url).origin
    origin.store.learn(told)
    for key, some in headings.items():
        for heading in some:
            origin.ranged(key).expect(heading)
    return origin


class RemotePath(PosixPath):
    """The name of an object or of a prefix of some, with the methods of a ``Path`` that read.

    Args:
        origin: The store and what is being read of it.
        key: From there; empty for the root.
    """

    origin: Origin
    key: str

    def __new__(cls, origin: Origin, key: str = "") -> Self:
        self = super().__new__(cls, origin.store.where(key))
        self.origin, self.key = origin, key
        return self

    def __init__(self, origin: Origin, key: str = "") -> None:
        if PosixPath.__init__ is not object.__init__:  # of Python 3.12 and later
            super().__init__(origin.store.where(key))  # type: ignore[call-arg]

    def __str__(self) -> str:
        return self.origin.store.where(self.key)

    def __fspath__(self) -> str:
        return str(self)

    @property
    def address(self) -> str:
        """The URL that means the same wherever it is read."""
        return self.origin.store.address(self.key)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __lt__(self, other: PurePath) -> bool:
        return str(self) < str(other)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process looks for itself; what was listed here is not what it will find.
        return self.origin.reopen, (str(self),)

    def _at(self, key: str) -> RemotePath:
        return RemotePath(self.origin, key)

    def __truediv__(self, name: str | os.PathLike[str]) -> RemotePath:
        parts = [part for part in os.fspath(name).split("/") if part not in {"", "."}]
        return self._at("/".join([*([self.key] if self.key else []), *parts]))

    def joinpath(self, *names: str | os.PathLike[str]) -> RemotePath:
        path = self
        for name in names:
            path /= name
        return path

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.origin.store.root.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return self._at(self.key.rpartition("/")[0])

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        found, key = [], self.key
        while key:
            key = key.rpartition("/")[0]
            found.append(self._at(key))
        return tuple(found)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.parent / f"{self.stem}{suffix}"

    def is_relative_to(self, *above: Any) -> bool:
        return str(self) == str(above[0]) or str(self).startswith(f"{above[0]}/")

    def relative_to(self, *above: Any, **_options: bool) -> Path:  # type: ignore[override]
        if not self.is_relative_to(*above):
            raise ValueError(f"{self} is not below {above[0]}")
        return Path(str(self)[len(str(above[0])) :].lstrip("/"))

    def is_absolute(self) -> bool:
        return True

    def resolve(self, strict: bool = False) -> RemotePath:  # noqa: FBT001, FBT002
        del strict
        return self

    absolute = expanduser = resolve

    @property
    def info(self) -> Info | None:
        """What the store says of the object; ``None`` where there is none of this name."""
        store, prefix = self.origin.store, self.key.rpartition("/")[0]
        if not self.key or ".." in self.key.split("/"):
            return None
        if prefix not in store.listed and not self.suffix and store.entries(self.key):
            return None  # one request tells of a directory, and of all that is in it
        return store.info(self.key)

    def is_file(self) -> bool:
        return self.info is not None

    def is_dir(self) -> bool:
        if ".." in self.key.split("/"):
            return False
        above, _, name = self.key.rpartition("/")
        store = self.origin.store
        if self.key and store.lists and above in store.listed:
            listed = store.entries(above)
            return name in listed and listed[name] is None
        if self.suffix and store.info(self.key) is not None:
            return False
        return bool(store.entries(self.key))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    def stat(self, **_options: bool) -> os.stat_result:
        info = self.info
        if info is None and not self.is_dir():
            raise FileNotFoundError(2, "there is no such object", str(self))
        mode, nbytes = (stat.S_IFDIR, 0) if info is None else (stat.S_IFREG, info.nbytes)
        at = 0 if info is None else info.modified
        device, number, *_ = (0, 0) if info is None else info.identity(str(self))
        whole = (mode | 0o444, number, device, 1, 0, 0, nbytes, *[at // 10**9] * 3)
        blocks = -(-nbytes // 512)
        return os.stat_result(whole, {"st_mtime_ns": at, "st_mtime": at / 1e9, "st_blocks": blocks})

    def identity(self) -> Identity:
        """What the object is.

        Raises:
            FileNotFoundError: There is none.
        """
        return self.ranged.info.identity(str(self))

    def require_unchanged(self, files: Iterable[str]) -> None:
        """Objects below are what they were when they were listed.

        Every range is asked for at that version; only what has no version is looked at again.

        Raises:
            SourceChangedError: Some are not; all are listed.
        """
        store = self.origin.store
        keys = [(self / file).key for file in files]
        gone = [key for key in keys if store.look_again(key) != store.info(key)]
        if gone:
            from dcpconv.stores.fetching import changed  # noqa: PLC0415

            raise changed([store.where(key) for key in gone])

    def iterdir(self) -> Generator[RemotePath, None, None]:
        for name in self.origin.store.entries(self.key):
            yield self / name

    def glob(self, pattern: str) -> Generator[RemotePath, None, None]:
        first, _, rest = pattern.partition("/")
        for path in [*self.iterdir()]:
            if not fnmatchcase(path.name, first):
                continue
            if rest:
                yield from path.glob(rest)
            elif path.is_dir() or not pattern.endswith("/"):
                yield path

    @property
    def ranged(self) -> Ranged:
        """The object to read.

        Raises:
            FileNotFoundError: There is none.
        """
        return self.origin.ranged(self.key)

    def read_bytes(self) -> bytes:
        return self.read_at_most(_LARGEST_WHOLE)

    def read_at_most(self, most: int) -> bytes:
        """All of an object that is not larger than it may be.

        Raises:
            FormatError: It is larger.
        """
        ranged = self.ranged
        if ranged.info.nbytes > most:
            facts = [("file", self), ("expected", f"at most {most:,} bytes")]
            raise FormatError("the file is far larger than any of its kind", facts)
        return ranged.read(0, ranged.info.nbytes)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", *_options: Any, **_named: Any) -> IO[Any]:  # type: ignore[override]
        if mode != "rb":
            raise io.UnsupportedOperation(f"{self} is not opened with mode {mode!r}")
        return io.BufferedReader(_Raw(self.ranged))


class _Raw(io.RawIOBase):
    """An object as a file that can be read and sought in."""

    def __init__(self, ranged: Ranged) -> None:
        self._ranged = ranged
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._ranged.info.nbytes)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._ranged.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_heads_ahead(directory: Path, names: Iterable[str]) -> None:
    """Have the first page of several objects fetched together; files here need no such thing.

    What goes wrong is told when an object is read.
    """
    if not isinstance(directory, RemotePath):
        return
    from dcpconv.stores.fetching import pool  # noqa: PLC0415

    files = [path for name in names if (path := directory / name).info is not None]
    for _ in pool().map(_head, files):
        pass


def _head(path: RemotePath) -> None:
    try:
        path.ranged.read(0, 1)  # brings a page
    except (OSError, DcpconvError):
        return
