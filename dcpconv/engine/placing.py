"""A result in a store: its objects, and the one that makes it a checkpoint, which is made last.

Nothing can be renamed there, so every object is written where it stays.  What makes them a
checkpoint is the index or ``.metadata``, or the one file itself.  It is created only if nobody else
has made one meanwhile, or put in place of the one that was there when we began.  Where anything is
below the prefix already, data goes under names that nobody has: an old checkpoint stays whole until
the moment it is replaced, and its objects are removed after that.

A mark below the prefix lists what a conversion may leave behind if the process dies.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dcpconv.core.errors import DcpconvError, TargetExistsError
from dcpconv.core.outline import Outline
from dcpconv.engine.manifests import manifest_of_file
from dcpconv.engine.uploading import Uploads, finished_first
from dcpconv.stores.fetching import fetch
from dcpconv.stores.objects import BESIDE
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.store import Info, Store, StoreError

_MARK: Final = ".dcpconv-unfinished-"
_BESIDE: Final = re.compile(rf".*{re.escape(BESIDE)}[0-9a-f]{{8}}")
_WEIGHTS: Final = (".safetensors", ".distcp", ".metadata", ".pth", ".pt", ".bin", ".json")
_ANOTHER: Final = "choose another name"
_LARGEST_MARK: Final = 64 << 20
"""Bytes of a mark; a result of 90,000 files has one of 4 MB."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What is at a target before a conversion.

    Attributes:
        target: Where a result goes.
        objects: What belongs to a checkpoint there.
        left: What conversions left that did not end, and their marks.
        stem: Goes into the names of data files, where something is there; else empty.
    """

    target: RemotePath
    objects: Mapping[str, Info] = field(default_factory=dict)
    left: Mapping[str, Info] = field(default_factory=dict)
    stem: str = ""


def survey(target: RemotePath, *, overwrite: bool, is_file: bool, source: Path) -> Ground:
    """Looks at a target in a store, and refuses one that must not be written.

    Args:
        target: Where a result goes.
        overwrite: Whether what is there may be replaced.
        is_file: Whether the result is one object.
        source: What is read, of which nothing is replaced.

    Raises:
        TargetExistsError: It exists and may not be replaced.
        StoreError: The store cannot be read, or is not written to.
    """
    store = target.origin.store
    if not store.writes:
        raise StoreError(
            "results are not written to this store",
            [("target", target)],
            hint="write to a path, or to a URL of s3, gs, az or hf",
        )
    if not target.key and not store.commits:
        raise _taken("a result needs a name in its bucket", target, f"name one: {target}/NAME")
    if isinstance(source, RemotePath):
        here, there = f"{target.address}/", f"{source.address}/"
        if here.startswith(there) or there.startswith(here):
            raise _taken(
                "the target is the source, or one is in the other", target, "choose another"
            )
    if is_file:
        keys = target.key, manifest_of_file(target).key
        objects = {key: info for key in keys if (info := store.look_at(key)) is not None}
        if target.key in objects and not overwrite:
            raise _exists(target)
        return Ground(target, objects if target.key in objects else {})
    found = store.walk(target.key)
    if store.commits:
        found = {key: info for key, info in found.items() if _is_ours(key, target.key)}
    elif not found and store.look_at(target.key) is not None:
        raise _taken(
            "the target is an object, but the result is several", target, "choose another name"
        )
    marks = [key for key in found if key.rpartition("/")[2].startswith(_MARK)]
    listed = {*marks}
    for mark in marks:
        names = _listed(store, mark, found[mark])
        if names and names[-1] not in found:  # else it did end, and could not remove its mark
            listed.update(names)
    listed.update(key for key in found if _BESIDE.fullmatch(key))
    left = {key: info for key, info in found.items() if key in listed}
    objects = {key: info for key, info in found.items() if key not in listed}
    if objects and not overwrite:
        raise _exists(target)
    strange = [key for key in objects if not _is_ours(key, target.key)]
    if strange and len(strange) == len(objects):
        raise _taken("what is there is no checkpoint", target, _ANOTHER)
    is_fresh = not found or store.commits
    return Ground(target, objects, left, "" if is_fresh else f"r{secrets.token_hex(4)}")


def _is_ours(key: str, prefix: str) -> bool:
    name = key[len(prefix) :].lstrip("/")
    return "/" not in name and name.endswith(_WEIGHTS)


def _listed(store: Store, key: str, info: Info) -> list[str]:
    with suppress(DcpconvError, ValueError, FileNotFoundError):
        if info.nbytes <= _LARGEST_MARK:
            names = json.loads(bytes(fetch(store, key, 0, info.nbytes, info)))
            return [name for name in names if isinstance(name, str)]
    return []


def _exists(target: RemotePath) -> TargetExistsError:
    hint = "pass --overwrite to replace it once the new one is complete"
    return _taken("the target exists", target, hint)


def _taken(headline: str, target: RemotePath, hint: str) -> TargetExistsError:
    return TargetExistsError(headline, [("target", target)], hint=hint)


@dataclass(slots=True)
class Placing:
    """A result on its way into a store.

    Attributes:
        path: Where it goes.
        uploads: Its data.
        ground: What was there before.
        made: Keys that are not of the result unless it is published.
        replaced: Small objects that were replaced, as they were.
        marks: Keys of the marks of this conversion.
        commits: How many of the last files make the data a checkpoint; none of one file.
        is_file: Whether the result is one object.
        attempted: The commit object that may be there, and may not, and what it holds.
        is_shared: Whether other processes may be making objects of the result.
        is_published: Whether it is a checkpoint by now.
    """

    path: RemotePath
    uploads: Uploads
    ground: Ground
    commits: int
    is_file: bool = False
    made: set[str] = field(default_factory=set)
    replaced: dict[str, bytes] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    attempted: tuple[str, bytes] | None = None
    is_shared: bool = False
    is_published: bool = False

    @property
    def store(self) -> Store:
        """The store."""
        return self.path.origin.store

    @property
    def is_of_one_process(self) -> bool:
        """Whether all data has to come from the process that publishes: a commit is of one, and a
        file that makes the result a checkpoint by itself is shown by the one that sends it."""
        return self.store.commits or not self.commits

    def share(self, outline: Outline) -> None:
        """Other processes make objects of the result too; ``others_have_ended`` ends that."""
        self.is_shared = True
        self.made.update((self.path / file.name).key for file in outline.files)

    def others_have_ended(self) -> None:
        """Other processes make no more objects."""
        self.is_shared = False

    def require_lengths(self, outline: Outline) -> None:
        """Every object that other processes made is where readers will look, and whole.

        Raises:
            StoreError: One is not; all are listed.
        """
        if self.is_of_one_process:
            return
        mine = set(self.uploads.keys)
        theirs = {key: file for file in outline.files if (key := self._key(file.name)) not in mine}
        found = self.store.walk(self.path.key) if theirs else {}
        lengths = {key: found[key].nbytes if key in found else None for key in theirs}
        wrong = [
            ("object", f"{self.store.where(key)}: {_length(nbytes)}, not {theirs[key].nbytes:,}")
            for key, nbytes in lengths.items()
            if nbytes != theirs[key].nbytes
        ]
        if wrong:
            hint = "give every rank the same endpoint, account and region"
            raise StoreError(
                "another rank's objects are not where they should be", wrong, hint=hint
            )

    def _key(self, name: str) -> str:
        return (self.path.with_name(name) if self.is_file else self.path / name).key

    def publish(self, commit: Sequence[tuple[str, bytes]] = ()) -> None:
        """Write what stands beside the data, then the commit object, and remove what is replaced.

        Args:
            commit: ``(relative name, content)``, in order.

        Raises:
            TargetExistsError: Somebody else finished meanwhile.
            StoreError: An object could not be written.
        """
        first = len(commit) - self.commits
        for name, data in commit[:first]:
            self._beside(self._key(name), data)
        self.uploads.release()
        for name, data in commit[first:]:
            key = self._key(name)
            known = self.ground.objects.get(key)
            self.made.add(key)
            self.attempted = (key, data)
            if not self.store.create(key, data, replaces=known):
                self.made.discard(key)
                self.attempted = None
                raise finished_first(self.path / name)
        self.is_published = not self.store.commits
        new = {*self.uploads.keys, *self.made}
        with suppress(DcpconvError):  # the result is whole, whatever stays beside it
            self.store.delete([*self.marks, *({*self.ground.objects, *self.ground.left} - new)])
        self.store.finish()
        self.is_published = True

    def mark(self, keys: Sequence[str]) -> None:
        """List what may be left behind if the process dies; the last one would make it whole."""
        key = (self.path / f"{_MARK}{secrets.token_hex(4)}").key
        self.marks.append(key)
        self.store.create(key, json.dumps(keys).encode(), replaces=None)

    def require_alone(self) -> None:
        """Nobody else has begun the same names since nothing was there: of two, one sees the other.

        Raises:
            TargetExistsError: Somebody has.
        """
        others = sorted(self.store.walk(self.path.key).keys() - {*self.marks})
        if others:
            raise TargetExistsError(
                "another conversion began this target at the same time",
                [("target", self.path), ("object", others[0])],
                hint="run this again once it has ended",
            )

    def _beside(self, key: str, data: bytes) -> None:
        known = self.ground.objects.get(key)
        if known is not None and not self.store.commits:
            self.replaced[key] = bytes(fetch(self.store, key, 0, known.nbytes, known))
        self.made.add(key)
        self.store.put(key, iter([data]), nbytes=len(data), part=len(data) + 1, at_once=1)

    def undo(self) -> None:
        """Leave everything as it was, as far as the store lets us; a mark tells what it did not."""
        self.uploads.stop()
        self.store.abandon()
        with suppress(DcpconvError):
            # Ctrl-C may come when the commit object is made: readers may have found the new data.
            is_whole = self.attempted is not None and self.store.holds(*self.attempted)
            if not self.store.commits and not is_whole:
                self._undo()

    def _undo(self) -> None:
        for key, data in self.replaced.items():
            self.store.put(key, iter([data]), nbytes=len(data), part=len(data) + 1, at_once=1)
        new = {*self.uploads.made, *self.made} - {*self.ground.objects}
        # The mark tells the next conversion what a process that still runs may make after this.
        self.store.delete([*new, *(() if self.is_shared else self.marks)])


def _length(nbytes: int | None) -> str:
    return "is not there" if nbytes is None else f"{nbytes:,} bytes"


@contextmanager
def placing(
    ground: Ground, outline: Outline, *, is_file: bool, beside: Sequence[str]
) -> Iterator[Placing]:
    """Lend a place for the objects of a result; what is not published is gone when the block ends.

    Args:
        ground: Where it goes, as ``survey`` found it.
        outline: Its data, and what makes them a checkpoint.
        is_file: Whether it is one object.
        beside: Names of small objects that stand beside the data.

    Raises:
        StoreError: The store is not written to.
    """
    target = ground.target
    uploads = Uploads(target, is_file=is_file, is_held=not outline.commit, known=ground.objects)
    placed = Placing(target, uploads, ground, len(outline.commit), is_file)
    try:
        if not is_file and not target.origin.store.commits:
            names = [*beside, *(file.name for file in reversed(outline.files))]
            names += [name for name, _ in outline.commit]
            placed.mark([(target / name).key for name in names])
            if not ground.stem:
                placed.require_alone()
        yield placed
    finally:
        if not placed.is_published:
            placed.undo()
