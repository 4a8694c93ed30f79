"""Optimizer state that DeepSpeed left flat in the files of all ranks, by FQN."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.errors import NotACheckpointError
from dcpconv.formats.ranks import universal, zero, zero_world
from dcpconv.formats.ranks.universal import Universal
from dcpconv.formats.ranks.zero_files import OptimFile
from dcpconv.formats.ranks.zero_world import ZeroWorld
from dcpconv.formats.torchfile.archive import StoredTensor
from dcpconv.plan.training.state import Group, OptimizerError
from dcpconv.sources.fitting import bare

_STEP: Final = "step"


@dataclass(frozen=True, slots=True)
class FlatRun:
    """A run's weights and optimizer state, without data.

    Attributes:
        catalog: The weights; extents are relative to the directory that was asked for.
        moments: Optimizer state by FQN.
        groups: Parameter groups.
    """

    catalog: Catalog
    moments: Mapping[str, Mapping[str, TensorEntry | float]]
    groups: tuple[Group, ...]


def find(path: Path) -> Path | None:
    """The directory of rank files that a run's directory is or leads to."""
    if universal.is_universal(path):
        return path
    return zero_world.find(path) or universal.find(path)


def read(directory: Path, root: Path) -> FlatRun:
    """Weights and optimizer state.

    Args:
        directory: As ``find`` returns it.
        root: Directory that extents are to be relative to.

    Raises:
        NotACheckpointError: No optimizer was saved.
        OptimizerError: The state is of another form than its parameters.
        FormatError: A file is missing, damaged or of another save, or parts do not add up.
    """
    if universal.is_universal(directory):
        found = universal.read_universal(directory, root)
        catalog = universal.catalog_of(found, root)
        moments, groups = _of_universal(found)
    else:
        world = zero_world.read_world(directory, root)
        if not world.optims:
            raise NotACheckpointError(
                "directory holds no optimizer state",
                [("directory", directory), ("expected", "*_optim_states.pt")],
                hint="weights alone are for `dcpconv convert`",
            )
        catalog = zero.catalog_of(world, root)
        moments, groups = _of_world(world)
    return FlatRun(catalog, moments, groups)


def _of_world(
    world: ZeroWorld,
) -> tuple[dict[str, dict[str, TensorEntry | float]], tuple[Group, ...]]:
    first = world.optims[0]
    ids = [number for group in first.param_groups for number in _ids(group)]
    if len(ids) != len(first.groups):
        ids = [*range(len(first.groups))]
    moments: dict[str, dict[str, TensorEntry | float]] = {}
    kinds = dict.fromkeys(kind for found in first.state.values() for kind in found)
    for kind in kinds:
        if kind != _STEP and _is_flat(first, kind):
            flat = zero.flat_entries(world, lambda optim, n: _vector(optim, ids[n], kind))  # noqa: B023
            for key, entry in flat.items():
                moments.setdefault(bare(key), {})[kind] = entry
    keys_of: dict[object, tuple[str, ...]] = dict.fromkeys(ids, ())
    for numbers, shapes in zero.groups_of(world):
        for number in numbers:
            keys_of[ids[number]] = tuple(map(bare, shapes))
    groups = []
    for group in first.param_groups or ({"params": ids},):
        group_ids = _ids(group)
        keys = tuple(dict.fromkeys(key for one in group_ids for key in keys_of[one]))
        for one in group_ids:
            step = _step(first, first.state.get(one, {}), group)
            for key in keys_of[one]:
                if step is not None and key in moments:
                    moments[key] = {_STEP: step, **moments[key]}
        groups.append(Group(_values(group), keys))
    return moments, tuple(groups)


def _of_universal(
    found: Universal,
) -> tuple[dict[str, dict[str, TensorEntry | float]], tuple[Group, ...]]:
    moments = {
        bare(key): {kind: state for kind, state in states.items() if kind != "fp32"}
        for key, states in found.tensors.items()
    }
    shapes = found.models[0].groups if found.models else ()
    values = found.param_groups
    if len(shapes) != len(values):
        ids = [len(_ids(group)) for group in values]
        if sum(ids) != len(shapes):
            raise OptimizerError(
                "which parameters form a group is not known",
                [
                    ("directory", found.directory),
                    ("expected", f"{len(values)} groups of parameters"),
                    ("found", f"{len(shapes)} in the model file"),
                ],
            )
        starts = [sum(ids[:n]) for n in range(len(ids) + 1)]
        shapes = tuple(
            {key: shape for part in shapes[a:b] for key, shape in part.items()}
            for a, b in pairwise(starts)
        )
    for group, keys in zip(values, shapes, strict=True):
        count = group.get(_STEP)
        for key in keys:
            if isinstance(count, (int, float)) and moments[bare(key)]:
                moments[bare(key)].setdefault(_STEP, float(count))
    groups = [
        Group(_values(group), tuple(map(bare, keys)))
        for group, keys in zip(values, shapes, strict=True)
    ]
    return {key: kinds for key, kinds in moments.items() if kinds}, tuple(groups)


def _vector(optim: OptimFile, number: object, kind: str) -> StoredTensor | None:
    found = optim.state.get(number, {}).get(kind)
    return found if isinstance(found, StoredTensor) else None


def _is_flat(optim: OptimFile, kind: str) -> bool:
    """Whether a state is as long as the weights.

    Raises:
        OptimizerError: It is something else than that and than a number.
    """
    states = {number: found[kind] for number, found in optim.state.items() if kind in found}
    if all(isinstance(state, StoredTensor) and len(state.shape) == 1 for state in states.values()):
        return True
    if all(state is None for state in states.values()):
        return False
    raise OptimizerError(
        "optimizer state is not of the parameters' shape",
        [("file", optim.file), *(("state", f"{kind} of group {number}") for number in states)],
    )


def _step(
    optim: OptimFile, state: Mapping[str, object], group: Mapping[str, object]
) -> TensorEntry | float | None:
    for found in (state.get(_STEP), group.get(_STEP)):
        if isinstance(found, StoredTensor):
            return zero.whole_entry(_STEP, optim.file, found)
        if isinstance(found, (int, float)):
            return float(found)
    return None


def _ids(group: Mapping[str, object]) -> list[object]:
    params = group.get("params")
    return list(params) if isinstance(params, (list, tuple)) else []


def _values(group: Mapping[str, object]) -> dict[str, object]:
    """The group's numbers; a count of steps belongs to its parameters."""
    return {
        key: value
        for key, value in group.items()
        if key not in {"params", "param_names", _STEP} and not re.match(r"ds_|__", key)
    }
