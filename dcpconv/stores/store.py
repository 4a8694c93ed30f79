"""What a store that is not this machine's disk can do: list, ranges of bytes in, whole objects out.

A ``Store`` answers for one checkpoint or run: what it has listed stays as it was listed, so that
everything planned from it is of one state, and every range is asked for at the version listed.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dcpconv.core.catalog import Identity
from dcpconv.core.errors import DcpconvError

Buffer = bytes | memoryview
"""Bytes that arrived, however the client below keeps them."""


class StoreError(DcpconvError):
    """A store cannot be reached, or does not give or take what it should.

    It is no ``OSError``: what a parser says of a file that it cannot read would hide it.
    """


@dataclass(frozen=True, slots=True)
class Info:
    """What a store says of one object.

    Attributes:
        nbytes: Its length.
        tag: ETag, or what else changes with the object; empty where the store says nothing.
        modified: Nanoseconds since 1970, or 0.
    """

    nbytes: int
    tag: str = ""
    modified: int = 0

    def identity(self, place: str) -> Identity:
        """The same as a file of this machine is identified."""
        digest = hashlib.blake2b(f"{place}\n{self.tag}".encode(), digest_size=14).digest()
        device, number = int.from_bytes(digest[:7], "big"), int.from_bytes(digest[7:], "big")
        return device, number, self.nbytes, self.modified


@dataclass(frozen=True, slots=True)
class Told:
    """What one process knows of the objects of a store.

    Attributes:
        root: What it calls the store.
        listed: Names below prefixes, as ``Store.entries`` has them.
        known: Objects that it has looked at by their keys.
        revision: What the store was at, where it has versions of its own.
    """

    root: str
    listed: Mapping[str, Mapping[str, Info | None]]
    known: Mapping[str, Info | None]
    revision: str | None = None


class TransientError(Exception):
    """One request failed in a way that may pass: too many requests, a cut connection.

    Args:
        what: In a few words.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class ChangedError(Exception):
    """The object is not the one that was listed any more."""


class Store(ABC):
    """Objects below one root, such as a bucket.

    Args:
        root: The URL that keys are relative to, without a slash at its end and without secrets.

    Attributes:
        lists: Whether what is not listed is not there.
        writes: Whether results are written to it.
        commits: Whether all that is written becomes visible together, with ``finish``.
        listed: What has been listed so far.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.lists = True
        self.writes = self.commits = False
        self.listed: dict[str, Mapping[str, Info | None]] = {}
        self._known: dict[str, Info | None] = {}

    def where(self, key: str) -> str:
        """What errors call an object."""
        return f"{self.root}/{key}" if key else self.root

    def address(self, key: str) -> str:
        """The URL of an object."""
        return self.where(key)

    def entries(self, prefix: str) -> Mapping[str, Info | None]:
        """Names right below a prefix, listed once; those that are prefixes themselves are ``None``.

        Raises:
            StoreError: There is no such bucket, or it may not be listed.
        """
        if prefix not in self.listed:
            found = () if prefix and self._is_ruled_out(prefix) else self._list(prefix)
            self.listed[prefix] = dict(sorted(found))
        return self.listed[prefix]

    def info(self, key: str) -> Info | None:
        """What is known of an object, asked for once; ``None`` where there is none.

        Raises:
            StoreError: The store does not answer as it should.
        """
        prefix, _, name = key.rpartition("/")
        if self.lists and prefix in self.listed:
            return self.listed[prefix].get(name)
        if key not in self._known:
            self._known[key] = None if self._is_ruled_out(prefix) else self._look(key)
        return self._known[key]

    def _is_ruled_out(self, prefix: str) -> bool:
        """Whether what is known already says that nothing is below a prefix."""
        if not self.lists or not prefix:
            return False
        if self._known.get(prefix) is not None:
            return True  # an object
        above, _, name = prefix.rpartition("/")
        if above in self.listed:
            return name not in self.listed[above] or self.listed[above][name] is not None
        return self._is_ruled_out(above)

    def forget(self) -> None:
        """What was listed may have changed."""
        self.listed.clear()
        self._known.clear()

    def told(self) -> Told:
        """What has been asked so far, for other processes that are to read the same objects."""
        return Told(self.root, dict(self.listed), dict(self._known))

    def learn(self, told: Told) -> None:
        """Takes over what another process has asked: nothing of it is asked again."""
        self.root, self.listed, self._known = told.root, dict(told.listed), dict(told.known)

    def look_at(self, key: str) -> Info | None:
        """What an object is now; ``None`` where there is none."""
        return self._look(key)

    def look_again(self, key: str) -> Info | None:
        """What an object is now, where a range is not asked for at the version listed."""
        info = self.info(key)
        return info if info is not None and info.tag else self._look(key)

    def walk(self, prefix: str) -> dict[str, Info]:
        """Every object below a prefix as it is now, by key.

        Raises:
            StoreError: There is no such bucket, or it may not be listed.
        """
        found, ahead = dict[str, Info](), [prefix]
        while ahead:
            below = ahead.pop()
            for name, info in self._list(below):
                key = f"{below}/{name}" if below else name
                if info is None:
                    ahead.append(key)
                else:
                    found[key] = info
        return found

    @abstractmethod
    def _list(self, prefix: str) -> Iterable[tuple[str, Info | None]]:
        """As ``entries``, asked of the store."""

    @abstractmethod
    def _look(self, key: str) -> Info | None:
        """As ``info``, asked of the store."""

    @abstractmethod
    def get(self, key: str, offset: int, nbytes: int, info: Info) -> Buffer:
        """Bytes of an object, in one request.

        Raises:
            TransientError: It may work the next time.
            ChangedError: The object is not what ``info`` says.
            StoreError: It will not work.
        """

    def put(
        self,
        key: str,
        parts: Iterable[bytes | bytearray],
        *,
        nbytes: int,
        part: int,
        at_once: int,
    ) -> None:
        """Makes an object of parts, which are sent in order, several at a time.

        What ``parts`` raises leaves no object, and no parts of one, behind.

        Args:
            key: Its name.
            parts: Its bytes.
            nbytes: How many they are together.
            part: Length of every part but the last.
            at_once: Parts on their way at a time.

        Raises:
            StoreError: The store cannot be written, or does not take it.
        """
        del key, parts, nbytes, part, at_once
        raise self._read_only()

    def put_if(
        self,
        key: str,
        parts: Iterable[bytes | bytearray],
        *,
        nbytes: int,
        part: int,
        at_once: int,
        replaces: Info | None,
    ) -> bool:
        """As ``put``, if none is there, or in place of one that is as it was.

        Returns:
            Whether it did; ``False`` where another one is there.

        Raises:
            StoreError: The store cannot be written, or does not take it.
        """
        del replaces  # what becomes visible together is asked for together
        self.put(key, parts, nbytes=nbytes, part=part, at_once=at_once)
        return True

    def create(self, key: str, data: bytes, *, replaces: Info | None) -> bool:
        """Makes a small object if none is there, or in place of one that is as it was.

        Returns:
            Whether it did; ``False`` where another one is there.

        Raises:
            StoreError: The store cannot be written, or does not take it.
        """
        del key, data, replaces
        raise self._read_only()

    def holds(self, key: str, data: bytes) -> bool:
        """Whether an object has these bytes now.

        Raises:
            StoreError: The store does not answer as it should.
        """
        del key, data
        return False

    def delete(self, keys: Sequence[str]) -> None:
        """Removes objects; those that are not there are no error."""
        if keys:
            raise self._read_only()

    def finish(self) -> None:  # noqa: B027 - most have nothing to do
        """Make visible what was written, where that happens together.

        Raises:
            StoreError: The store does not take it.
            TargetExistsError: Somebody else wrote meanwhile.
        """

    def abandon(self) -> None:  # noqa: B027 - likewise
        """Forget what was written and is not visible yet, where that happens together."""

    def _read_only(self) -> StoreError:
        return StoreError(
            "results are not written to this store",
            [("store", self.root)],
            hint="write to a path, or to a URL of s3, gs, az or hf",
        )


Opener = Callable[[str], tuple[Store, str]]
"""Makes the store that a URL names, and the key in it."""


def without_secrets(text: str) -> str:
    """A text in which the URLs have lost what may be a credential: user, password and query.

    >>> without_secrets("GET https://me:secret@host/a?sig=abc failed")
    'GET https://host/a failed'
    """
    text = re.sub(r"(?<=://)[^/\s@]*@", "", text)
    return re.sub(r"(?<=\S)\?[^\s\"']*", "", text) if "://" in text else text
