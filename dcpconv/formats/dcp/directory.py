"""DCP directories: ``.metadata`` lists the chunks of every tensor, ``*.distcp`` files hold them.

Reading looks at ``.metadata`` and at the head of every item; writing is in ``dcp_outline``.

Source: torch 2.13 ``distributed/checkpoint/filesystem.py`` (files, items),
``default_planner.py`` (keys are paths joined with a dot; ``planner_data`` holds the paths).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from dcpconv.core.catalog import Catalog, Chunk, Extent, Identity, TensorEntry
from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.formats.boxes import inspect_boxes
from dcpconv.formats.collecting import without_garbage_collection
from dcpconv.formats.dcp.items import locate, read_objects
from dcpconv.formats.dcp.metadata import MetadataContents, read_metadata
from dcpconv.formats.dcp.names import METADATA_FILE
from dcpconv.formats.dcp.objects import OpaqueObject
from dcpconv.formats.dcp.unflattened import unfold
from dcpconv.formats.dcp.unpacking import contents_in, unpacked
from dcpconv.formats.dcp.writing import outline
from dcpconv.formats.safetensors.metadata import from_side_file
from dcpconv.stores.local import identity_of, read_regular

__all__ = ["OpaqueObject", "explain", "is_dcp", "outline", "read_catalog"]


def is_dcp(path: Path) -> bool:
    """Whether ``path`` is a directory with the file that completes a DCP save."""
    return path.is_dir() and (path / METADATA_FILE).is_file()


def explain(path: Path) -> str | None:
    """Why a directory that looks like DCP is not a whole checkpoint; ``None`` if it does not."""
    if is_dcp(path) or not path.is_dir():
        return None
    if any(path.glob("__*" + METADATA_FILE)):
        return (
            "DCP saved by each rank alone (use_collectives=False): there is no common .metadata;"
            " load it with torch and save it again"
        )
    if any(path.glob("*.distcp")):
        return "DCP without .metadata: the save was interrupted, or that file was not copied"
    return None


def read_catalog(path: Path, *, problems: list[str] | None = None) -> Catalog:
    """List what a DCP directory holds, and check that it holds all of it.

    Replicas of a chunk and chunks without elements are left out; two keys with the same items
    count as tied.

    Args:
        path: The directory with ``.metadata``.
        problems: With a list, what is wrong is appended, one line each, and reading goes on with
            the keys that can be read; without one it is an error.

    Raises:
        NotACheckpointError: There is no ``.metadata``.
        FormatError: ``.metadata`` cannot be read; or, without ``problems``, a file is missing or
            short, an item is not the tensor it should be, or chunks leave a gap or overlap.
            All problems are listed.
    """
    where = str(path / METADATA_FILE)
    if not is_dcp(path):
        raise NotACheckpointError(
            "not a DCP directory", [("expected", where)], hint=explain(path) or None
        )
    with without_garbage_collection():
        catalog, found = _read(path, where)
    if problems is not None:
        problems += found
    elif found:
        raise FormatError(
            "checkpoint is damaged or incomplete",
            [("directory", path), *(("problem", problem) for problem in found)],
            hint="copy the missing or short files again, or take another step's checkpoint"
            if any(": file is missing" in text or " bytes, but needs " in text for text in found)
            else "the save did not end well, or the files were altered; take another step's",
        )
    return catalog


def _read(path: Path, where: str) -> tuple[Catalog, list[str]]:
    file = path / METADATA_FILE
    try:
        identities = {METADATA_FILE: identity_of(file)}
        contents = read_metadata(read_regular(file, most=_LARGEST_METADATA), where=where)
    except OSError as error:
        raise FormatError(
            "metadata of a distributed checkpoint cannot be read",
            [("file", where), ("because", error.strerror)],
        ) from error
    source = path
    if contents.packed:
        made = unpacked(path, contents, identities)
        path, contents, identities = made.path, made.contents, {}
    files = _measure(path, contents, identities)
    lost = _Lost(files)
    whole = [row for row in contents.objects.items() if lost.has(*row)]
    unfolded = unfold(dict(read_objects(path, whole)), contents.paths)
    found = list(contents.problems)
    tensors = _read_tensors(path, contents, lost, found)
    found += [f"{key}: two values have this key" for key in unfolded.tensors if key in tensors]
    found += unfolded.problems
    tensors |= unfolded.tensors
    found += lost.problems()
    # What .metadata lists is judged here, so that a lost file is one line and not one per tensor.
    for key, tensor in contents.tensors.items():
        boxes = [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
        found += [f"{key}: {problem}" for problem in inspect_boxes(tensor.shape, boxes)]
    metadata, notes = from_side_file(path)
    catalog = Catalog(
        form="dcp",
        path=path,
        source=source,
        files={file: nbytes for file, nbytes in files.items() if nbytes is not None},
        tensors=tensors,
        objects=unfolded.objects,
        paths={**contents.paths, **unfolded.paths},
        tied=_find_tied(tensors),
        notes=(
            *(() if contents.is_nesting_known or unfolded.tensors else (_NO_NESTING,)),
            *(
                (f"its items are compressed; they were unpacked into {path}",)
                if path != source
                else ()
            ),
            *notes,
        ),
        identities=identities,
        metadata=metadata,
    )
    return catalog, found


_LARGEST_METADATA = 1 << 31
"""Bytes; a hundred times what a 671B model over a thousand ranks takes."""

_NO_NESTING = (
    ".metadata does not say how keys are nested (no planner_data); they are taken as they are"
)


def contents_of(catalog: Catalog) -> MetadataContents:
    """What the ``.metadata`` behind a catalog lists, items where the catalog has them.

    Raises:
        FormatError: It cannot be read any more.
    """
    kept = contents_in(catalog.path)
    if kept is not None:
        return kept
    file = catalog.path / METADATA_FILE
    try:
        return read_metadata(read_regular(file, most=_LARGEST_METADATA), where=str(file))
    except OSError as error:
        raise FormatError(
            "metadata of a distributed checkpoint cannot be read",
            [("file", file), ("because", error.strerror)],
        ) from error


def _find_tied(tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    tied: dict[str, str] = {}
    owners: dict[object, str] = {}
    for key, entry in tensors.items():
        if entry.nbytes and entry.chunks:
            owner = owners.setdefault((entry.dtype, entry.shape, entry.chunks), key)
            if owner != key:
                tied[key] = owner
    return tied


def _measure(
    path: Path, contents: MetadataContents, identities: dict[str, Identity]
) -> dict[str, int | None]:
    """Size of every file that an item names, and what it is; ``None`` where it is not a file."""
    named: dict[str, int | None] = {}
    for item in _items(contents):
        if item.file not in named:
            file = path / item.file
            try:
                is_file = stat.S_ISREG(file.stat().st_mode)
            except OSError:
                is_file = False
            if is_file:
                identities[item.file] = identity_of(file)
            named[item.file] = identities[item.file][2] if is_file else None
    return dict(sorted(named.items()))


def _items(contents: MetadataContents) -> Iterable[Extent]:
    yield from contents.objects.values()
    for tensor in contents.tensors.values():
        for chunk in tensor.chunks:
            yield chunk.item


class _Lost:
    """Items that are not where they should be, told per file: a lost file concerns many keys."""

    def __init__(self, files: dict[str, int | None]) -> None:
        self._files = files
        self._keys: dict[str, list[str]] = {}
        self._needed: dict[str, int] = {}

    def has(self, key: str, item: Extent) -> bool:
        """Whether the item's bytes exist; if not, remember it."""
        available, needed = self._files[item.file], item.offset + item.nbytes
        if available is not None and needed <= available:
            return True
        self._keys.setdefault(item.file, []).append(key)
        self._needed[item.file] = max(self._needed.get(item.file, 0), needed)
        return False

    def problems(self) -> list[str]:
        """One line per file."""
        lines = []
        for file, keys in sorted(self._keys.items()):
            nbytes = self._files[file]
            items = f"{len(keys)} item{'s' * (len(keys) > 1)}, first of {keys[0]}"
            if nbytes is None:
                lines.append(f"{file}: file is missing ({items})")
            else:
                needed = self._needed[file]
                lines.append(f"{file}: {nbytes} bytes, but needs at least {needed} ({items})")
        return lines


def _read_tensors(
    path: Path, contents: MetadataContents, lost: _Lost, found: list[str]
) -> dict[str, TensorEntry]:
    wanted = [
        (key, tensor.dtype, chunk)
        for key, tensor in contents.tensors.items()
        for chunk in tensor.chunks
        if lost.has(key, chunk.item)
    ]
    chunks: list[Chunk | None] = [None] * len(wanted)
    for index, located in locate(path, wanted):
        if isinstance(located, str):
            found.append(f"{wanted[index][0]}: {located}")
        else:
            chunks[index] = located

    stored: dict[str, list[Chunk]] = {key: [] for key in contents.tensors}
    for (key, _, _), chunk in zip(wanted, chunks, strict=True):
        if chunk is not None:
            stored[key].append(chunk)
    return {
        key: TensorEntry(key, tensor.dtype, tensor.shape, tuple(stored[key]))
        for key, tensor in contents.tensors.items()
    }
