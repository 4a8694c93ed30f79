"""Directories of ``torch_checkpointing``: a file per item and rank, and ``metadata.pkl``.

``<item>_<rank>.pt`` holds what a rank had of an item (``model``, ``optimizer``, ``step``), unless
``metadata.pkl`` names another file or safetensors.  That pickle is of plain values; it is there
where the trainer asked for resharding, and says where each rank's tensors belong.  Without it the
DTensors in the files do.

Source: torch_checkpointing 0.1.1 ``checkpoint_layout.py``, ``distributed_metadata.py`` (versions
1.0 and 2.0), ``dtensor_metadata.py``, ``default_metadata.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from dcpconv.core.catalog import Catalog, KeyPath, TensorEntry, c_strides
from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.formats import safetensors
from dcpconv.formats.ranks.joining import Joined, RankFile, join, mesh_ranks
from dcpconv.formats.torchfile.contents import flattened, read_leaves, read_value
from dcpconv.formats.torchfile.pieces import (
    Mesh,
    MeshPlacement,
    MeshTensor,
    RankPiece,
    ShardedParts,
)
from dcpconv.formats.torchfile.stored import StoredTensor
from dcpconv.formats.torchfile.unpickling import check_size, loads
from dcpconv.stores.json_files import read_json
from dcpconv.stores.local import identities_of, identity_of, read_regular

METADATA: Final = "metadata.pkl"
_NAME = re.compile(r"(?P<item>[A-Za-z0-9_-]+)_(?P<rank>\d{1,7})\.pt")
_MODEL: Final = "model"
_LARGEST_METADATA: Final = 1 << 30
"""Bytes; a 671B model on a thousand ranks is below."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One item of a checkpoint.

    Attributes:
        name: ``model``, ``optimizer``, ...
        files: Relative path by rank.
        places: What ``metadata.pkl`` says of a tensor, by its key and rank.
    """

    name: str
    files: Mapping[int, str]
    places: Mapping[str, Mapping[int, Mapping[str, object]]]


def is_directory(path: Path) -> bool:
    """Whether a directory is of this package: it says so, or its first file holds DTensors."""
    if not path.is_dir():
        return False
    if (path / METADATA).is_file():
        return True
    first = path / f"{_MODEL}_0.pt"
    if not first.is_file():
        return False
    try:
        leaves = read_leaves(first).leaves
    except DcpconvError:
        return False
    return any(isinstance(leaf, RankPiece) for _, leaf in leaves.values())


def read_catalog(path: Path) -> Catalog:
    """Everything in the files of all ranks: weights under ``model``, other items beside them.

    Raises:
        FormatError: Files are lost or damaged, or do not fit together.
    """
    items, world = _items(path)
    joined = Joined()
    files: dict[str, int] = {}
    identities = identities_of(path, [METADATA])
    for item in items:
        is_needed = item.name == _MODEL
        lost = [name for name in item.files.values() if not (path / name).is_file()]
        if lost:
            raise FormatError(
                "files of ranks are missing",
                [("directory", path), *(("missing", name) for name in lost[:8])],
                hint="fetch them; the others cannot be used without",
            )
        ranks = [_read(path, item, rank) for rank in sorted(item.files)]
        of_mesh = mesh_ranks(ranks)
        if of_mesh > world:
            names = [f"{item.name}_{rank}.pt" for rank in range(world, of_mesh)]
            raise FormatError(
                "files of ranks are missing",
                [("directory", path), *(("missing", name) for name in names[:8])],
                hint="fetch them; the others cannot be used without",
            )
        part = join(ranks)
        part.require(path)
        _add(joined, item.name, part)
        files |= {file.name: file.nbytes for file in ranks if is_needed or part.tensors}
        identities |= {file.name: file.identity for file in ranks}
    return Catalog(
        form="torch",
        path=path,
        source=path,
        files=files,
        tensors=joined.tensors,
        objects=joined.objects,
        paths=joined.paths,
        tied=joined.tied,
        notes=(f"files of {world} ranks are read as one checkpoint",),
        identities=identities,
    )


def _items(path: Path) -> tuple[list[_Item], int]:
    """The items, the model first, and how many ranks there were."""
    found: dict[str, dict[int, str]] = {}
    for file in sorted(path.iterdir()):
        match = _NAME.fullmatch(file.name)
        if match is not None and file.is_file():
            found.setdefault(match["item"], {})[int(match["rank"])] = file.name
    stated, world = _stated(path) if (path / METADATA).is_file() else ([], 0)
    world = world or max(found.get(_MODEL, {0: ""})) + 1
    named = {item.name for item in stated}
    items = [
        *stated,
        *(
            _Item(name, {rank: f"{name}_{rank}.pt" for rank in range(world)}, {})
            for name in found
            if name not in named and (name == _MODEL or set(range(world)) <= found[name].keys())
        ),
    ]
    if not any(item.name == _MODEL for item in items):
        raise FormatError(
            "the checkpoint has no item of weights",
            [("directory", path), ("expected", _MODEL), *(("found", item.name) for item in items)],
        )
    return sorted(items, key=lambda item: (item.name != _MODEL, item.name)), world


def _stated(path: Path) -> tuple[list[_Item], int]:
    where = path / METADATA
    data = read_regular(where, most=_LARGEST_METADATA)
    value = loads(data, allowed={}, where=str(where))
    check_size(value, len(data), str(where))
    try:
        return _parse(value)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(
            "metadata is not what torch_checkpointing writes",
            [("file", where), ("reason", f"{type(error).__name__}: {error}")],
        ) from error


def _parse(value: object) -> tuple[list[_Item], int]:
    fields = _mapping(value)
    world = fields["world_size"]
    if type(world) is not int or not 0 < world <= 1 << 20:
        raise ValueError(f"world_size {world!r}")
    if fields.get("version") == "2.0":
        items = {str(name): _mapping(item) for name, item in _mapping(fields["metadata"]).items()}
    else:
        items = _grouped(fields)
    return [_item(name, item, world) for name, item in items.items()], world


def _grouped(fields: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """Version 1.0, whose paths start with the item, as version 2.0 has it."""
    layouts = _mapping(fields["rank_to_layout_info_mappings"])
    paths: dict[str, dict[str, object]] = {}
    for text, groups in _mapping(fields["metadata"]).items():
        name, *inner = json.loads(text)
        paths.setdefault(str(name), {})[json.dumps(inner)] = groups
    return {
        name: {
            "nested_path_to_metadata": found,
            "rank_to_layout_info": {
                rank: _mapping(layout).get(name) for rank, layout in layouts.items()
            },
        }
        for name, found in paths.items()
    }


def _item(name: str, fields: Mapping[str, object], world: int) -> _Item:
    layouts = {int(rank): info for rank, info in _mapping(fields["rank_to_layout_info"]).items()}
    if set(layouts) != set(range(world)):
        raise ValueError(f"{name} has files of ranks {sorted(layouts)[:8]}, of {world}")
    files = {}
    for rank, info in layouts.items():
        file = f"{name}_{rank}.pt" if info is None else str(_mapping(info)["file_path"])
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(f"{file!r} lies outside the checkpoint")
        files[rank] = file
    places: dict[str, dict[int, Mapping[str, object]]] = {}
    for text, groups in _mapping(fields["nested_path_to_metadata"]).items():
        key = ".".join(map(str, json.loads(text)))
        for group in groups if isinstance(groups, list) else ():
            for rank in _mapping(group)["ranks"]:  # type: ignore[attr-defined]
                places.setdefault(key, {})[int(rank)] = _mapping(
                    _mapping(group)["sharding_metadata"]
                )
    return _Item(name, files, places)


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping, found {type(value).__name__}")
    return value


def _read(directory: Path, item: _Item, rank: int) -> RankFile:
    name = item.files[rank]
    if name.endswith(".safetensors"):
        catalog = safetensors.read_catalog(directory / name)
        leaves: dict[str, tuple[KeyPath, object]] = {
            key: ((key,), _stored(entry)) for key, entry in catalog.tensors.items()
        }
        identity = catalog.identities[PurePosixPath(name).name]
    elif name.endswith(".json"):
        leaves, identity = {"": ((), read_json(directory / name))}, identity_of(directory / name)
    else:
        value, identity = read_value(directory / name)
        leaves = {"": ((), value)}
        if isinstance(value, dict):
            leaves = dict(flattened(value, identity, str(directory / name)).leaves)
    for key, places in item.places.items():
        path, leaf = leaves.get(key, ((), None))
        if isinstance(leaf, StoredTensor) and rank in places:
            leaves[key] = path, _placed(leaf, places[rank], directory / name, key)
    return RankFile(name, rank, identity, leaves)


def _stored(entry: TensorEntry) -> StoredTensor:
    extent = entry.chunks[0].extent
    strides = c_strides(entry.shape)
    return StoredTensor(
        entry.key, entry.dtype, 0, entry.shape, strides, extent.offset, extent.nbytes
    )


def _placed(
    local: StoredTensor, said: Mapping[str, object], file: Path, key: str
) -> StoredTensor | RankPiece:
    """What a rank held of a tensor, of which the file itself has the bytes alone."""
    try:
        data = _mapping(said["data"])
        if said["type"] == "DTensorShardingMetadata":
            return _of_mesh(local, data)
        if said["type"] == "default_tensor_v1":
            return ShardedParts(_numbers(data["global_shape"]), (*_boxes(local, data),), 1)
        raise ValueError(f"{said['type']!r} is no kind of placement that we know")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FormatError(
            "metadata does not say where a tensor belongs",
            [("file", file), ("key", key), ("reason", f"{type(error).__name__}: {error}")],
        ) from error


def _of_mesh(local: StoredTensor, data: Mapping[str, object]) -> StoredTensor | MeshTensor:
    mesh = _mapping(data["mesh_spec"])
    sizes, ranks = _numbers(mesh["mesh_shape"]), _numbers(mesh["mesh_data"])
    axes = tuple(((size, step),) for size, step in zip(sizes, c_strides(sizes), strict=True))
    shape = _numbers(data["global_shape"])
    placements = tuple(_placement(item, len(shape)) for item in _list(data["placements"]))
    if len(placements) != len(axes):
        raise ValueError(f"{len(placements)} placements on a mesh of {len(axes)} axes")
    piece = MeshTensor(shape, local, Mesh(axes, ranks), placements, tuple(range(len(axes))))
    return piece.whole() or piece


_KINDS: Final[Mapping[str, Literal["shard", "strided", "replicate"]]] = {
    "Shard": "shard",
    "StridedShard": "strided",
    "Replicate": "replicate",
}


def _placement(item: object, dims: int) -> MeshPlacement:
    fields = _mapping(item)
    kind = _KINDS[str(fields["type"])]
    (dim, factor) = _numbers([fields.get("dim", 0), fields.get("split_factor", 1)])
    if kind != "replicate" and (dim >= dims or not 0 < factor <= 1 << 16):
        raise ValueError(f"{fields} does not fit {dims} dims")
    return MeshPlacement(kind, dim, factor)


def _boxes(
    local: StoredTensor, data: Mapping[str, object]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], StoredTensor]]:
    fields = ("global_offsets", "local_offsets", "local_sizes")
    rows: Sequence[Sequence[object]] = [_list(data[name]) for name in fields]
    for row in zip(*rows, strict=True):
        at, inside, sizes = map(_numbers, row)
        fits = zip(inside, sizes, local.shape, strict=True)
        if any(start + size > length for start, size, length in fits):
            raise ValueError(f"{list(sizes)} at {list(inside)} is not in {list(local.shape)}")
        first = sum(i * stride for i, stride in zip(inside, local.strides, strict=True))
        place = local.offset + first * local.dtype.itemsize
        yield at, sizes, replace(local, shape=sizes, offset=place)


def _numbers(value: object) -> tuple[int, ...]:
    found = tuple(_list(value))
    if any(type(item) is not int or item < 0 for item in found):
        raise ValueError(f"{found} are not whole numbers")
    return found  # type: ignore[return-value]


def _list(value: object) -> list[object]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return list(value)


def _add(joined: Joined, item: str, part: Joined) -> None:
    """Puts an item of the checkpoint below its name."""

    def named(key: str) -> str:
        return f"{item}.{key}" if key else item

    for key, entry in part.tensors.items():
        joined.tensors[named(key)] = replace(entry, key=named(key))
        joined.paths[named(key)] = (item, *part.paths.get(key, (key,)))
    for key, value in part.objects.items():
        joined.objects[named(key)] = value
        joined.paths[named(key)] = (item, *part.paths.get(key, (key,))) if key else (item,)
    joined.tied.update({named(key): named(owner) for key, owner in part.tied.items()})
