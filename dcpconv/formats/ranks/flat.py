"""FSDP1's ``LOCAL_STATE_DICT``: parameters that lie flat, so that files do not say their shapes.

Under ``use_orig_params`` a file has every parameter under its own name, as the run of elements
that the rank held.  Without it a module has one vector, ``<module>._flat_param``: its parameters
end to end, in the order in which its modules were registered.  Names and shapes that are in no
file come from outside: from a parameter file, from another checkpoint of the same model, or from
the live model.

Source:
    torch 2.13 ``torch/distributed/fsdp/_state_dict_utils.py`` (``_local_post_state_dict_hook``) and
    ``_flat_param.py`` (``_init_flat_param_and_metadata``, ``_use_sharded_views``): only with
    ``use_orig_params`` is there padding between parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.errors import FormatError
from dcpconv.formats.ranks.intervals import Segment, chunks_of
from dcpconv.formats.ranks.joining import Joined, RankFile, entry_of, entry_of_slices, join
from dcpconv.formats.torchfile.pieces import ShardedParts
from dcpconv.formats.torchfile.stored import StoredTensor

_FLAT: Final = ("_flat_param", "flat_param")
"""Last component of the parameter that FSDP1 makes of all parameters of a module."""

_SHOWN: Final = 8
"""Keys named in an error of each kind."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Names and shapes of a model's parameters, from outside its rank files.

    Attributes:
        shapes: By key; second names of tied parameters may be absent.
        is_ordered: Whether they are in the order of ``model.parameters()``.
        origin: Where they are from.
        tied: Second name -> key of the parameter that it is another name of.
    """

    shapes: Mapping[str, tuple[int, ...]]
    is_ordered: bool
    origin: str
    tied: Mapping[str, str] = field(default_factory=dict)


FindParameters = Callable[[], Parameters | None]
"""Looks for names and shapes; only called where files lack them."""


Slices = Mapping[str, Sequence[tuple[RankFile, StoredTensor]]]
"""What every rank held of a parameter, by key."""


def is_flat(files: Sequence[RankFile]) -> bool:
    """Whether the files are of a local state dict."""
    return any(_module_of(key) is not None for file in files[:1] for key in file.leaves)


def join_flat(directory: Path, files: Sequence[RankFile], find: FindParameters | None) -> Joined:
    """One entry for every key of local state dicts.

    Args:
        directory: Where the files lie.
        files: Of all ranks.
        find: Looks for the names and shapes that are in no file.

    Raises:
        FormatError: Nothing says the shapes, or they are not those of these files.
    """
    found = find() if find is not None else None
    if found is None:
        raise _without_shapes(directory, files)
    vectors = join([_only(file, is_vector=True) for file in files])
    vectors.require(directory)
    others = [_only(file, is_vector=False) for file in files]
    held = _held(others)
    wrong: list[tuple[str, object]] = []
    named: dict[str, TensorEntry] = {}
    for key in held.keys() & found.shapes.keys():
        entry, faults = _named(key, held[key], found.shapes[key])
        wrong += faults
        if entry is not None:
            named[key] = entry
    unnamed, faults = _cut(vectors.tensors, found, held.keys())
    wrong += faults
    told = {key: owner for key, owner in found.tied.items() if owner in unnamed}
    tied = {**told, **_second_names(held, named)}
    wrong += [("unknown", key) for key in _sliced(files, held) if key not in {**named, **tied}]
    if wrong:
        raise _unlike(directory, found, wrong)
    rest = [_without(file, {**named, **tied}) for file in others]
    joined = join(rest)
    joined.tensors = {
        **unnamed,
        **named,
        **{key: replace({**unnamed, **named}[owner], key=key) for key, owner in tied.items()},
        **joined.tensors,
    }
    joined.tied.update(tied)
    return joined


def _module_of(key: str) -> str | None:
    """The module whose vector a key is; ``None`` for every other key."""
    module, _, name = key.rpartition(".")
    return module if name in _FLAT else None


def _only(file: RankFile, *, is_vector: bool) -> RankFile:
    return replace(
        file,
        leaves={
            key: item
            for key, item in file.leaves.items()
            if (_module_of(key) is not None) == is_vector
        },
    )


def _without(file: RankFile, keys: Collection[str]) -> RankFile:
    return replace(file, leaves={k: item for k, item in file.leaves.items() if k not in keys})


def _held(files: Sequence[RankFile]) -> Slices:
    held: dict[str, list[tuple[RankFile, StoredTensor]]] = {}
    for file in files:
        for key, (_, leaf) in file.leaves.items():
            if isinstance(leaf, StoredTensor):
                held.setdefault(key, []).append((file, leaf))
    return held


def _named(
    key: str, held: Sequence[tuple[RankFile, StoredTensor]], shape: tuple[int, ...]
) -> tuple[TensorEntry | None, list[tuple[str, object]]]:
    """A parameter whose runs have its name, or that every rank held whole."""
    if all(tensor.shape == shape for _, tensor in held):
        return entry_of(key, held)
    return entry_of_slices(key, held, shape)


def _cut(
    vectors: Mapping[str, TensorEntry], found: Parameters, named: Collection[str]
) -> tuple[dict[str, TensorEntry], list[tuple[str, object]]]:
    """The parameters that are in no file by name, out of the vectors of their modules."""
    modules = {str(_module_of(key)): vector for key, vector in vectors.items()}
    inside: dict[str, list[str]] = {module: [] for module in modules}
    wrong: list[tuple[str, object]] = []
    for key in found.shapes:
        if key not in named:
            module = _innermost(key, modules)
            if module is None:
                wrong.append(("missing", key))
            else:
                inside[module].append(key)
    entries: dict[str, TensorEntry] = {}
    for module, keys in inside.items():
        vector = modules[module]
        numels = [math.prod(found.shapes[key]) for key in keys]
        if keys and sum(numels) != vector.numel:
            what = f"{len(keys)} parameters of {sum(numels)} elements"
            wrong.append(("vector", f"{vector.key} has {vector.numel} elements, not {what}"))
        elif len(keys) > 1 and not found.is_ordered:
            wrong.append(("vector", f"{vector.key}: the order of its {len(keys)} parameters"))
        else:
            segments = [*_segments(vector)]
            for key, at in zip(keys, accumulate(numels, initial=0), strict=False):
                shape, itemsize = found.shapes[key], vector.dtype.itemsize
                chunks = chunks_of(shape, segments, at=at, itemsize=itemsize)
                entries[key] = TensorEntry(key, vector.dtype, shape, tuple(chunks))
    return entries, wrong


def _innermost(key: str, modules: Collection[str]) -> str | None:
    module = key
    while module:
        module = module.rpartition(".")[0]
        if module in modules:
            return module
    return None


def _segments(vector: TensorEntry) -> Iterator[Segment]:
    for chunk in sorted(vector.chunks, key=lambda chunk: chunk.offsets):
        yield Segment(chunk.offsets[0], chunk.sizes[0], chunk.extent.file, chunk.extent.offset)


def _second_names(held: Slices, named: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Keys whose runs are, on every rank, those of a parameter that is named already."""
    owners = {_regions(held[key]): key for key in reversed([k for k in held if k in named])}
    return {
        key: owner
        for key, slices in held.items()
        if key not in named and (owner := owners.get(_regions(slices))) is not None
    }


def _regions(held: Sequence[tuple[RankFile, StoredTensor]]) -> tuple[object, ...]:
    return tuple(
        (file.name, tensor.storage_key, tensor.offset, tensor.shape)
        for file, tensor in held
        if tensor.nbytes
    )


def _sliced(files: Sequence[RankFile], held: Slices) -> Iterator[str]:
    """Keys of parameters: they lie in the vector of a module, or ranks hold unlike runs of them."""
    storages = {
        (file.name, tensor.storage_key)
        for file in files
        for key, (_, leaf) in file.leaves.items()
        if _module_of(key) is not None and isinstance(leaf, ShardedParts)
        for *_, tensor in leaf.parts
    }
    for key, slices in held.items():
        if len({tensor.shape for _, tensor in slices}) > 1 or any(
            (file.name, tensor.storage_key) in storages for file, tensor in slices
        ):
            yield key


def _without_shapes(directory: Path, files: Sequence[RankFile]) -> FormatError:
    keys = [key for key in files[0].leaves if _module_of(key) is not None]
    return FormatError(
        "FSDP1's local state dict keeps parameters as flat vectors, without their shapes",
        [("directory", directory), *(("key", key) for key in keys[:4])],
        hint="--assets DIR names the config.json of a model that we know, or any checkpoint of the"
        " same model, and they are read; a live model says them, too",
    )


def _unlike(directory: Path, found: Parameters, wrong: Sequence[tuple[str, object]]) -> FormatError:
    more = [("and", f"{len(wrong) - _SHOWN} more")] if len(wrong) > _SHOWN else []
    hint = "--assets DIR names a config.json, or a checkpoint, of this very model"
    if not found.is_ordered:
        hint = (
            "vectors need the order of the parameters: --assets FILE.pth names a torch.save file of"
            " the same model, which has them in it"
        )
    return FormatError(
        "the parameters of the local state dict are not those that it was given",
        [("directory", directory), ("shapes of", found.origin), *wrong[:_SHOWN], *more],
        hint=hint,
    )
