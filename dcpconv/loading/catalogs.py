"""One look at a checkpoint or an adapter for all ranks: rank 0 opens it, the others are told.

Every header on shared storage is opened once per job.  On each other host one rank looks whether
its files are those that rank 0 saw: the same inode, size and time mean shared storage.  Where they
are copies, that rank opens the copies itself, compares a few KiB of them too, and says what is
wrong with them, or what they hold instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from dcpconv.core.catalog import Catalog, Identity, TensorEntry
from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.loading.sampling import Sampled, sample
from dcpconv.loading.world import World, hostname, portable
from dcpconv.sources.adapters.record import Adapter
from dcpconv.sources.packing import pack, rebased, unpack
from dcpconv.sources.understanding import Source
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.schemes import is_remote, path_of

Found = TypeVar("Found", Source, Adapter)


@dataclass(frozen=True, slots=True)
class Seen(Generic[Found]):
    """What a rank knows of the checkpoint.

    Attributes:
        source: The checkpoint, or an adapter, under the path that it has here.
        hosts: Of every rank.
        digest: Equal where the same checkpoint is seen.
        files: Size and sampled bytes of every file, where they were compared.
        beside: What the opener knows beside the weights.
    """

    source: Found
    hosts: tuple[str, ...]
    digest: str
    files: tuple[Sampled, ...] = ()
    beside: Any = None


@dataclass(frozen=True, slots=True)
class Opened(Generic[Found]):
    """A checkpoint, or an adapter, that has been opened.

    Attributes:
        source: Its weights.
        beside: What else is known of it.
        entries: Tensors in there.
    """

    source: Found
    beside: Any = None
    entries: tuple[TensorEntry, ...] = ()


Opener = Callable[[Path], Opened[Found]]
"""Opens a checkpoint; called on rank 0, and where a host has copies of its files."""


@dataclass(frozen=True, slots=True)
class View:
    """What a rank says of the files that it sees.

    Attributes:
        host: Where it runs.
        digest: Of tensors and files.
        files: Size and sampled bytes of every file.
    """

    host: str
    digest: str
    files: tuple[Sampled, ...]


def look(
    name: str | os.PathLike[str],
    opener: Opener[Found],
    world: World,
    *,
    only_first: bool,
    adapters: int = 0,
) -> Seen[Found] | Exception:
    """The checkpoint as rank 0 understands it, and whether this host has the same; an error is
    returned, since all ranks are to hear of it.

    Args:
        name: What this rank's caller named: a path, which may be another one on every rank, or a
            hub id.
        opener: Opens it.
        world: The ranks.
        only_first: Whether only rank 0 sees the files.
        adapters: How many will be looked at next, as many on every rank.

    Raises:
        DcpconvError: Ranks have different numbers of adapters.
        LostRankError: A rank does not answer.
    """
    told = world.gather((hostname(), _absolute(name), adapters))
    hosts = tuple(host for host, *_ in told)
    if len(counts := {count for *_, count in told}) > 1:
        facts = [("adapters", f"{min(counts)} on some ranks, {max(counts)} on others")]
        raise DcpconvError("the ranks were told to merge different adapters", facts)
    first = told.index(told[world.rank])
    path = _located(name)
    told_by_first: tuple[bytes, Path, str] | None = None
    opened: Opened[Found] | None = None
    failure: Exception | None = None
    if world.rank == 0:
        try:
            opened = opener(_or_raise(path))
            if world.size == 1:
                return Seen(opened.source, hosts, "", beside=opened.beside)
            packed = pack(opened.source, opened.beside, opened.entries)
            told_by_first = packed, _or_raise(path), _digest(opened.source, ())
        except Exception as error:  # noqa: BLE001 - all ranks hear of it
            failure = error
        opened = None  # what was packed takes less memory: equal shapes are one
    told_by_first = world.from_first(told_by_first)
    if told_by_first is None:
        return failure or _own_failure(path, opener)
    packed, old, digest = told_by_first
    source, beside = unpack(packed)
    if only_first:
        if world.rank:
            source = rebased(source, old, old, {})
        return Seen(source, hosts, digest, beside=beside)
    if isinstance(old, RemotePath):  # a store has no copies; all ask for the versions rank 0 listed
        return Seen(source, hosts, digest, beside=beside)
    if isinstance(path, Exception):
        failure = path
    seen = Seen(source, hosts, digest, beside=beside)
    return _compared(seen, old, path, opener, world, first, failure)


def _compared(
    seen: Seen[Found],
    old: Path,
    path: Path | Exception,
    opener: Opener[Found],
    world: World,
    first: int,
    failure: Exception | None,
) -> Seen[Found] | Exception:
    """What is here beside what rank 0 saw; every rank takes part."""
    source, beside = seen.source, seen.beside
    is_copy = False
    if isinstance(path, Path):
        here: Mapping[str, Identity] | None = source.catalog.identities if first == 0 else {}
        if first == world.rank != 0:
            here = _same_files(rebased(source, old, path, {}).catalog, source.catalog)
            is_copy = here is None
        source = rebased(source, old, path, here or {})
    copies = any(world.gather(is_copy))
    view: View | None = None
    if failure is None and (is_copy or (copies and world.rank == 0)):
        try:
            if is_copy:
                opened = opener(_or_raise(path))
                source, beside = opened.source, opened.beside
            sampled = sample(source.catalog)
            view = View(hostname(), _digest(source, sampled), sampled)
        except Exception as error:  # noqa: BLE001 - all ranks hear of it
            failure = error
    views = world.gather(view.digest if view else "") if copies else []
    if failure is not None:
        return failure
    digest = (views[first] or views[0]) if views else seen.digest
    files = view.files if view else ()
    return replace(seen, source=source, digest=digest, files=files, beside=beside)


def require_alike(seen: Seen[Found], world: World) -> None:
    """Every rank sees the same checkpoint.

    Raises:
        FormatError: A rank sees another one; says which rank, which host and which file.
    """
    digests = world.gather(seen.digest)
    if len(set(digests)) == 1:
        return
    # A digest stands for the files of the rank that looked at them first.
    firsts = {digest: digests.index(digest) for digest in digests}
    files: dict[str, tuple[Sampled, ...]] = {}
    for digest, rank in list(firsts.items())[:9]:
        files[digest] = world.from_rank(seen.files, rank)
    views = [
        View(host, digest, files.get(digest, ()))
        for host, digest in zip(seen.hosts, digests, strict=True)
    ]
    raise unlike(world.from_first(str(seen.source.catalog.source)), views)


def unlike(source: str, heard: Sequence[View]) -> FormatError:
    """The error for ranks that see different checkpoints: which rank, which host, which file."""
    first = heard[0]
    right = {file.file: file for file in first.files}
    facts: list[tuple[str, object]] = [
        ("source", source),
        ("rank 0", f"{first.host} {first.digest}"),
    ]
    others = [rank for rank, view in enumerate(heard) if view.digest != first.digest]
    for rank in others[:8]:
        view = heard[rank]
        found = {file.file: file for file in view.files}
        facts.append((f"rank {rank}", f"{view.host} {view.digest}"))
        for name in dict.fromkeys([*right, *found]):
            old, new = right.get(name), found.get(name)
            if old == new:
                continue
            if old is None or new is None:
                facts.append(("file", f"{name}: only on rank {0 if new is None else rank}"))
            elif old.nbytes != new.nbytes:
                facts.append(("file", f"{name}: {new.nbytes} bytes, {old.nbytes} on rank 0"))
            else:
                facts.append(("file", f"{name}: {new.nbytes} bytes on both, with other contents"))
        if view.files == first.files:
            facts.append(("shapes", "the files are the same; another config or other options"))
    if len(others) > 8:
        facts.append(("ranks", f"{len(others)} of {len(heard)} differ from rank 0"))
    return FormatError(
        "ranks see different checkpoints; nothing was loaded",
        facts,
        hint="fetch the same files on every host, or read='rank0'",
    )


def _absolute(name: str | os.PathLike[str]) -> str:
    text = os.fspath(name)
    return text if is_remote(text) else os.path.abspath(text)  # noqa: PTH100 - `..` is not followed


def _located(name: str | os.PathLike[str]) -> Path | Exception:
    """The path that a name means here; one in a store asks for nothing yet."""
    try:
        return path_of(name)
    except Exception as error:  # noqa: BLE001 - all ranks hear of it
        return portable(error) or error


def _or_raise(path: Path | Exception) -> Path:
    if isinstance(path, Exception):
        raise path
    return path


def _own_failure(path: Path | Exception, opener: Opener[Found]) -> Exception:
    """What this rank would have raised, where rank 0 has failed; a store is asked by one rank."""
    if not isinstance(path, RemotePath):
        try:
            opener(_or_raise(path))
        except Exception as error:  # noqa: BLE001 - all ranks hear of it
            return error
    return DcpconvError("rank 0 cannot open the checkpoint")


def _same_files(here: Catalog, there: Catalog) -> dict[str, Identity] | None:
    """The files of a path, if they are those of another host, on storage that both see."""
    found: dict[str, Identity] = {}
    for file, (_, *wanted) in there.identities.items():
        try:
            state = (here.path / file).stat()
        except OSError:
            return None
        found[file] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        if [*found[file][1:]] != wanted:
            return None
    return found or None


def _digest(source: Source | Adapter, files: Sequence[Sampled]) -> str:
    """Of what is stored, not of what is wanted: ranks of a pipeline want different things."""
    hasher = hashlib.sha256()
    for update in source.updates if isinstance(source, Adapter) else ():
        hasher.update(f"{update.key} {update.scale}\n".encode())
    for key, entry in sorted(source.catalog.tensors.items()):
        places = [(chunk.offsets, chunk.extent) for chunk in entry.chunks]
        hasher.update(f"{key} {entry.dtype} {entry.shape} {places}\n".encode())
    for file in files:
        hasher.update(f"{file.file} {file.nbytes} {file.digest}\n".encode())
    return hasher.hexdigest()[:16]
