"""Optimizer state in the rank files of FSDP trainers, by the names of its parameters.

torch counts parameters in an optimizer's state.  Here they get the names that the model's rank
files have them under, in the same order, where numbers, groups and shapes leave one reading only.

Source:
    verl 0.4 to 0.7 ``verl/utils/checkpoint/fsdp_checkpoint_manager.py`` (``optimizer.state_dict()``
    as it is); torch 2.13 ``torch/distributed/fsdp/_flat_param.py`` (a rank's slice of the flat
    parameter, in C order, is what it holds of each parameter under ``use_orig_params``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, KeyPath, TensorEntry
from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.core.numbering import some_of
from dcpconv.formats.ranks.fsdp import find_sets, read_catalog, read_set
from dcpconv.formats.ranks.joining import HeldPiece, RankFile, entry_of, entry_of_slices
from dcpconv.formats.torchfile.pieces import MeshTensor, ShardedParts
from dcpconv.formats.torchfile.stored import StoredTensor

_Shapes = Mapping[str, tuple[int, ...]]
_Seen = Mapping[str, tuple[tuple[int, ...] | None, int]]
"""Shape, where moments say it, and number of elements of every parameter with state."""


@dataclass(frozen=True, slots=True)
class _Group:
    """A parameter group: its numbers, and its parameters as the file has them."""

    values: Mapping[str, object]
    params: tuple[object, ...]


def read_training(path: Path) -> Catalog:
    """Weights and optimizer state of a directory of rank files, keyed as ``dcp.save`` would.

    ``model.<name>``, ``optimizer.state.<name>.<moment>``, ``optimizer.param_groups.<n>.<value>``,
    of which ``params`` are names; every extent is relative to ``path``.

    Raises:
        NotACheckpointError: There are no rank files of an optimizer.
        FormatError: Files are lost or damaged, or it is not certain which parameter a number means.
    """
    sets = find_sets(path, optimizer=True)
    if len(sets) != 1:
        raise NotACheckpointError(
            "directory does not hold the optimizer state of one save",
            [
                ("directory", path),
                ("expected", "optim_world_size_N_rank_R.pt of every rank"),
                *(("found", found.name(min(found.names))) for found in sets),
            ],
            hint="weights alone are for `dcpconv convert`",
        )
    model = read_catalog(path)
    files, _ = read_set(path, sets[0])
    groups = _groups(files[0])
    shapes = {key: entry.shape for key, entry in model.tensors.items()}
    held = _held(files)
    names = _names(path, groups, [key for key in shapes if key not in model.tied], held, shapes)

    tensors = {
        f"model.{key}": replace(entry, key=f"model.{key}") for key, entry in model.tensors.items()
    }
    paths: dict[str, KeyPath] = {f"model.{key}": ("model", key) for key in model.tensors}
    faults: list[tuple[str, object]] = []
    for (number, kind), each in held.items():
        name = names.get(number)
        if name is None:
            faults.append(("unknown", f"{kind} of parameter {number}, which no group has"))
            continue
        key = f"optimizer.state.{name}.{kind}"
        paths[key] = ("optimizer", "state", name, kind)
        entry, wrong = _moment(key, each, shapes[name])
        faults += wrong
        if entry is not None:
            tensors[key] = entry
    if faults:
        raise FormatError(
            "optimizer state does not fit the parameters", [("directory", path), *faults[:12]]
        )
    objects: dict[str, object] = {f"model.{key}": item for key, item in model.objects.items()}
    paths |= {f"model.{key}": ("model", *model.path_of(key)) for key in model.objects}
    for count, group in enumerate(groups):
        values = {**group.values, "params": [names[str(param)] for param in group.params]}
        for label, value in values.items():
            key = f"optimizer.param_groups.{count}.{label}"
            objects[key] = value
            paths[key] = ("optimizer", "param_groups", count, label)
    return replace(
        model,
        files={**model.files, **{file.name: file.nbytes for file in files}},
        identities={**model.identities, **{file.name: file.identity for file in files}},
        tensors=tensors,
        objects=objects,
        paths=paths,
        tied={f"model.{key}": f"model.{owner}" for key, owner in model.tied.items()},
    )


def _held(files: Sequence[RankFile]) -> dict[tuple[str, str], list[HeldPiece]]:
    """What each rank held, by parameter (number or name) and moment."""
    held: dict[tuple[str, str], list[HeldPiece]] = {}
    for file in files:
        for path, leaf in file.leaves.values():
            is_tensor = isinstance(leaf, (StoredTensor, MeshTensor, ShardedParts))
            if is_tensor and len(path) == 3 and path[0] == "state":
                held.setdefault((str(path[1]), str(path[2])), []).append((file, leaf))
    return held


def _groups(file: RankFile) -> list[_Group]:
    found: dict[int, dict[str, object]] = {}
    for path, leaf in file.leaves.values():
        if len(path) == 3 and path[0] == "param_groups" and isinstance(path[1], int):
            found.setdefault(path[1], {})[str(path[2])] = leaf
    groups = []
    for _, values in sorted(found.items()):
        params = values.pop("params", ())
        groups.append(_Group(values, tuple(params) if isinstance(params, (list, tuple)) else ()))
    if not groups:
        raise FormatError("optimizer state has no parameter groups", [("file", file.name)])
    return groups


def _names(
    path: Path,
    groups: Sequence[_Group],
    keys: Sequence[str],
    held: Mapping[tuple[str, str], Sequence[HeldPiece]],
    shapes: _Shapes,
) -> dict[str, str]:
    """Number -> name; a name stands for itself."""
    params = [param for group in groups for param in group.params]
    if all(isinstance(param, str) for param in params):
        strange = [param for param in params if param not in shapes]
        if strange:
            facts = [("unknown", param) for param in strange[:8]]
            raise FormatError("optimizer names parameters that the model lacks", facts)
        return {str(param): str(param) for param in params}
    sizes = [len(group.params) for group in groups]
    seen = _seen_shapes(held)
    readings: list[list[str]] = []
    parameters = _parameters(keys, len(params), shapes)
    for reading in (parameters, _by_dims(parameters, sizes, shapes)):
        is_new = reading is not None and reading not in readings
        if reading is not None and is_new and _fits(params, reading, seen, shapes):
            readings.append(reading)
    for reading in [] if readings else _some_of(groups, keys, seen, shapes):
        if reading not in readings:
            readings.append(reading)
    if len(readings) != 1:
        raise _no_reading(path, params, keys, readings)
    return {str(param): name for param, name in zip(params, readings[0], strict=True)}


def _parameters(keys: Sequence[str], count: int, shapes: _Shapes) -> list[str] | None:
    """The keys that are parameters: all, or all but the buffers of normalisation layers."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    trained = [key for key in keys if key.rpartition(".")[2] not in statistics]
    for found in (list(keys), trained, [key for key in trained if shapes[key]]):
        if len(found) == count:
            return found
    return None


def _by_dims(keys: Sequence[str] | None, sizes: Sequence[int], shapes: _Shapes) -> list[str] | None:
    """Matrices first and vectors after, as trainers with and without weight decay group them."""
    if keys is None or len(sizes) != 2:
        return None
    matrices = [key for key in keys if len(shapes[key]) > 1]
    vectors = [key for key in keys if len(shapes[key]) < 2]
    return [*matrices, *vectors] if [len(matrices), len(vectors)] == list(sizes) else None


def _some_of(
    groups: Sequence[_Group], keys: Sequence[str], seen: _Seen, shapes: _Shapes
) -> list[list[str]]:
    """The first and the last choice of parameters, where the others were frozen."""

    def fits(number: object, name: str) -> bool:
        return _fits([number], [name], seen, shapes)

    orders = [[keys]] if len(groups) == 1 else []
    if len(groups) == 2:
        matrices = [key for key in keys if len(shapes[key]) > 1]
        orders.append([matrices, [key for key in keys if len(shapes[key]) < 2]])
    readings: list[list[str]] = []
    for order in orders:
        pairs = zip(groups, order, strict=True)
        found = [some_of(group.params, names, fits) for group, names in pairs]
        if all(found):
            readings += [[name for choices in found for name in choices[n]] for n in (0, 1)]
    return readings


def _seen_shapes(
    held: Mapping[tuple[str, str], Sequence[HeldPiece]],
) -> dict[str, tuple[tuple[int, ...] | None, int]]:
    """Shape, where moments say it, and number of elements of every parameter with state."""
    seen: dict[str, tuple[tuple[int, ...] | None, int]] = {}
    for (number, _), each in held.items():
        leaf = each[0][1]
        if isinstance(leaf, (MeshTensor, ShardedParts)):
            seen[number] = (leaf.shape, math.prod(leaf.shape))
        elif isinstance(leaf, StoredTensor) and leaf.shape:
            count = sum(math.prod(t.shape) for _, t in each if isinstance(t, StoredTensor))
            seen.setdefault(number, (None, count))
    return seen


def _fits(
    params: Sequence[object],
    names: Sequence[str],
    seen: _Seen,
    shapes: _Shapes,
) -> bool:
    for param, name in zip(params, names, strict=True):
        shape, count = seen.get(str(param), (None, 0))
        numel = math.prod(shapes[name])
        if shape is not None and shape != shapes[name]:
            return False
        if shape is None and count and (not numel or count % numel):
            return False
    return True


def _no_reading(
    path: Path, params: Sequence[object], keys: Sequence[str], readings: Sequence[Sequence[str]]
) -> FormatError:
    if len(readings) > 1:
        differ = [
            f"{number} is {one} or {two}"
            for number, one, two in zip(params, *readings[:2], strict=True)
            if one != two
        ]
        return FormatError(
            "several parameters may be meant by a number in the optimizer state",
            [("directory", path), *(("ambiguous", line) for line in differ)],
        )
    return FormatError(
        "the optimizer state does not count the parameters that the rank files hold",
        [
            ("directory", path),
            ("expected", f"{len(keys)} parameters, as in the model's files"),
            ("found", f"{len(params)} numbers, or moments of other shapes"),
        ],
        hint="FSDP1 without use_orig_params keeps moments of whole modules in one vector; only the"
        " trainer can take them apart",
    )


def _moment(
    key: str, held: Sequence[HeldPiece], shape: tuple[int, ...]
) -> tuple[TensorEntry | None, list[tuple[str, object]]]:
    plain = [(file, leaf) for file, leaf in held if isinstance(leaf, StoredTensor)]
    if len(plain) < len(held) or all(tensor.shape in {(), shape} for _, tensor in plain):
        return entry_of(key, held)
    return entry_of_slices(key, plain, shape)
