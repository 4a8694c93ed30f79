"""The files that a run keeps beside its weights, as nested values without data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import Catalog, Chunk, Extent, KeyPath
from dcpconv.core.errors import FormatError
from dcpconv.formats import dcp
from dcpconv.formats.torchfile.archive import StoredTensor, read_archive, read_tensors
from dcpconv.formats.torchfile.nesting import key_of


def nested(file: Path, catalog: Catalog) -> dict[str, object]:
    """The saved value of a `torch.save` file, with the catalog's entries in place of tensors."""
    with file.open("rb") as opened:
        descriptor = opened.fileno()
        archive = read_archive(
            lambda offset, nbytes: os.pread(descriptor, nbytes, offset),
            os.fstat(descriptor).st_size,
            str(file),
        )
        value, _ = read_tensors(archive)

    def visit(path: KeyPath, node: object) -> object:
        if isinstance(node, StoredTensor):
            return catalog.tensors[key_of(path)]
        if isinstance(node, dict):
            return {key: visit((*path, str(key)), item) for key, item in node.items()}
        if isinstance(node, list):
            return [visit((*path, index), item) for index, item in enumerate(node)]
        return node

    found = visit((), value)
    if not isinstance(found, dict):
        raise FormatError("file holds no mapping", [("file", file)])
    return found


def prefixed(catalog: Catalog, name: str) -> Catalog:
    """The same catalog; entries get a key that tells their file, for error messages."""
    tensors = {
        key: replace(entry, key=f"{name}.{key}" if name else key)
        for key, entry in catalog.tensors.items()
    }
    return replace(catalog, tensors=tensors)


def below(path: Path, name: str) -> Catalog:
    """A DCP inside a step, its extents relative to the step."""
    catalog = dcp.read_catalog(path / name)

    def moved(chunk: Chunk) -> Chunk:
        extent = chunk.extent
        return replace(chunk, extent=Extent(f"{name}/{extent.file}", extent.offset, extent.nbytes))

    return replace(
        catalog,
        tensors={
            key: replace(entry, chunks=tuple(map(moved, entry.chunks)))
            for key, entry in catalog.tensors.items()
        },
        files={f"{name}/{file}": nbytes for file, nbytes in catalog.files.items()},
        identities={f"{name}/{file}": one for file, one in catalog.identities.items()},
    )


_JOINED: Final = ("files", "tensors", "objects", "paths", "tied", "identities")


def joined(path: Path, parts: list[Catalog]) -> Catalog:
    """Several catalogs as one, below ``path``."""

    def union(field: str) -> dict[str, object]:
        return {key: item for part in parts for key, item in getattr(part, field).items()}

    return Catalog(
        form="dcp",
        path=path,
        source=path,
        **{field: union(field) for field in _JOINED},  # type: ignore[arg-type]
    )


def parts_of_optimizer(
    value: Mapping[str, object], file: Path
) -> tuple[Mapping[object, object], list[Mapping[str, object]]]:
    """``state`` and ``param_groups`` of what ``optimizer.state_dict()`` made.

    Raises:
        FormatError: It is something else.
    """
    state, groups = value.get("state"), value.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise FormatError(
            "optimizer state is not what an optimizer's state_dict() holds",
            [("file", file), ("expected", "state and param_groups"), ("found", ", ".join(value))],
        )
    return state, [group for group in groups if isinstance(group, Mapping)]
