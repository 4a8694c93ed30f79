"""What one process knows of a conversion, to be compared with what another knows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from dcpconv.conversion.deciding import Decided
from dcpconv.conversion.worlds.seats import RankError
from dcpconv.core.errors import DcpconvError, SourceChangedError
from dcpconv.core.outline import Fill, OutFile

Look = dict[str, dict[str, Any]]
"""``sources``, ``options`` and ``files``, each by name, of values that JSON can hold."""


def look_of(decided: Decided) -> Look:
    """Everything that has to be the same in all processes.

    Paths may differ from host to host, and so may device and inode of a file; what lies there may
    not.
    """
    catalog, wanted = decided.job.catalog, decided.job.wanted
    source = catalog.source.resolve()
    path = catalog.path.resolve()
    # Unpacked items lie where this process has put them, and are of now.
    is_theirs = path == source.parent or path.is_relative_to(source)
    options = {one.name: str(getattr(wanted, one.name)) for one in fields(wanted)}
    return {
        "sources": {
            file: [size, _mark(path / file, mtime) if is_theirs else str(size)]
            for file, (_, _, size, mtime) in sorted(catalog.identities.items())
        },
        "options": {k: v for k, v in options.items() if k not in {"path", "overwrite"}},
        "files": {file.name: _digest(file) for file in decided.outline.files},
    }


def compare(theirs: Look, mine: Look, *, source: Path, rank: int, host: str) -> None:
    """Refuse to write a part of something else than rank 0 decided.

    Args:
        theirs: What rank 0 knows.
        mine: What this process knows.
        source: What is converted, as this process finds it.
        rank: This process.
        host: Where it runs.

    Raises:
        SourceChangedError: A source file is not the one that rank 0 sees.
        RankError: The options or the results differ.
    """
    for what, make in (("sources", _sources), ("options", _options), ("files", _files)):
        one, other = theirs[what], mine[what]
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        if names:
            raise make(names, one, other, [("source", source), ("rank", f"{rank} on {host}")])


def _sources(
    names: list[str], one: dict[str, Any], other: dict[str, Any], facts: list[tuple[str, object]]
) -> DcpconvError:
    return SourceChangedError(
        "the source looks different on another host",
        [*facts, *(("file", f"{name}: {_how(one.get(name), other.get(name))}") for name in names)],
        hint="give every rank the same files; a copy must keep their times (cp -p, rsync -t)",
    )


def _how(one: list[Any] | None, other: list[Any] | None) -> str:
    if one is None or other is None:
        return f"only {'rank 0' if other is None else 'this rank'} has it"
    if one[0] != other[0]:
        return f"{one[0]:,} bytes on rank 0, {other[0]:,} here"
    return "written at another time"


def _options(
    names: list[str], one: dict[str, Any], other: dict[str, Any], facts: list[tuple[str, object]]
) -> DcpconvError:
    found = [("option", f"{name}: {one.get(name)} on rank 0, {other.get(name)}") for name in names]
    return RankError(
        "the ranks were started with different options",
        [*facts, *found],
        hint="start every rank with the same command",
    )


def _files(
    names: list[str], one: dict[str, Any], other: dict[str, Any], facts: list[tuple[str, object]]
) -> DcpconvError:
    del one, other
    return RankError(
        "the ranks plan different results",
        [*facts, *(("result", name) for name in names)],
        hint="is the same version of dcpconv, and the same parameter file, on every host?",
    )


def _mark(path: Path, mtime: int) -> str:
    """What tells one state of a file from another, on every host.

    Each host downloads into a cache of its own, where the name of a blob is the digest of its bytes
    (huggingface_hub, "Understand caching").
    """
    real = path.resolve()
    return real.name if real.parent.name == "blobs" else str(mtime)


def _digest(file: OutFile) -> str:
    found = hashlib.blake2b(digest_size=16)
    for text in _told(file):
        found.update(text if isinstance(text, bytes) else text.encode())
        found.update(b"\0")
    return found.hexdigest()


def _told(file: OutFile) -> Iterator[str | bytes]:
    yield str(file.nbytes)
    for offset, data in file.literals:
        yield f"{offset}:{len(data)}"
        yield data
    for offset, fill in file.payloads:
        yield from _fill(offset, fill)


def _fill(offset: int, fill: Fill) -> Iterator[str | bytes]:
    yield f"{offset} {fill.source_dtype.name} {fill.target_dtype.name} {fill.numel}"
    for part in fill.parts:
        yield f"{part.file} {part.offset} {part.target} {part.loops} {part.half}"
    yield b"" if fill.data is None else fill.data
    for scale in fill.scales:
        yield repr(scale)
    for changed in fill.changes:
        yield repr(changed)
