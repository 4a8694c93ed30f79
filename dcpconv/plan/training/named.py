"""Runs whose optimizer state goes by the names of its parameters: DCP, rank files of FSDP and
``torch_checkpointing``, DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import Catalog, KeyPath, TensorEntry
from dcpconv.core.errors import NotACheckpointError
from dcpconv.formats import dcp
from dcpconv.formats.torchfile.nesting import nest
from dcpconv.plan.training import deepspeed
from dcpconv.plan.training.state import Group, Kind, Moments, OptimizerError, TrainingState, part_of
from dcpconv.plan.training.understood import understood, with_ties
from dcpconv.sources.fitting import bare
from dcpconv.sources.said import Said

_OPTIMIZERS: Final = ("optim", "optimizer")


def read_deepspeed(directory: Path, path: Path, said: Said) -> TrainingState:
    """A run under ZeRO, or a universal checkpoint.

    Args:
        directory: Of the rank files.
        path: What the user named; extents are relative to it.
        said: What the user says of the weights.
    """
    flat = deepspeed.read(directory, path)
    model = understood(flat.catalog, said)
    return TrainingState(
        kind="deepspeed",
        source=path,
        root=path,
        model=with_ties(model, flat.groups),
        moments=flat.moments,
        groups=flat.groups,
        beside={},
        notes=model.notes,
        identities=flat.catalog.identities,
    )


def read_named(kind: Kind, source: Path, catalog: Catalog, said: Said) -> TrainingState:
    """A run whose catalog is keyed as ``dcp.save`` keys ``{"model", "optim", ...}``.

    Args:
        kind: Whose it is.
        source: What the user named.
        catalog: Weights, optimizer state by FQN, and whatever else was saved.
        said: What the user says of the weights.

    Raises:
        NotACheckpointError: It holds no optimizer state.
        OptimizerError: That is not of these parameters, or its groups do not name them.
    """
    everything: dict[str, object] = {**catalog.tensors, **catalog.objects}
    optimizer = next(
        (name for name in _OPTIMIZERS if any(k.startswith(f"{name}.state.") for k in everything)),
        None,
    )
    if optimizer is None:
        raise NotACheckpointError(
            "checkpoint holds no optimizer state",
            [("source", source), ("expected", "keys such as optim.state.<fqn>.exp_avg")],
            hint="weights alone are for `dcpconv convert`",
        )
    own = {k: e for k, e in catalog.tensors.items() if not k.startswith(f"{optimizer}.")}
    tops = {str(catalog.path_of(key)[0]) for key in own}
    model = "model" if "model" in tops else None
    chosen = {k: e for k, e in own.items() if model is None or catalog.path_of(k)[0] == model}
    found = understood(part_of(catalog, chosen), said, root=model)
    notes = (*catalog.notes, *found.notes)
    moments = _moments(catalog, optimizer)
    groups = _groups(everything, optimizer, source)
    strangers = sorted(set(moments) - set(found.weights.entries))
    if strangers:
        raise OptimizerError(
            "the optimizer state is not of these parameters",
            [("source", source), *(("unknown", key) for key in strangers[:8])],
        )
    rest: list[tuple[KeyPath, object]] = []
    for key, item in everything.items():
        path = catalog.path_of(key)
        if key in chosen or key.startswith(f"{optimizer}."):
            continue
        if isinstance(item, dcp.OpaqueObject):
            notes += (f"{key} stays behind: it cannot be read without trust ({item.reason})",)
        else:
            rest.append((path, item))
    return TrainingState(
        kind=kind,
        source=source,
        root=catalog.path,
        model=with_ties(found, groups),
        moments=moments,
        groups=groups,
        beside={name: _with_ids(value) for name, value in nest(rest).items()},
        notes=notes,
        identities=catalog.identities,
    )


def _with_ids(value: object) -> object:
    """An optimizer's state with its ids as numbers again: a DCP has only texts for keys."""
    if isinstance(value, dict) and isinstance(value.get("state"), dict) and "param_groups" in value:
        state = {int(k) if k.isdigit() else k: item for k, item in value["state"].items()}
        return {**value, "state": state}
    return value


def _moments(catalog: Catalog, optimizer: str) -> Moments:
    prefix = f"{optimizer}.state."
    moments: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in catalog.tensors.items():
        if key.startswith(prefix):
            fqn, _, name = key[len(prefix) :].rpartition(".")
            moments.setdefault(bare(fqn), {})[name] = entry
    odd = [key for key in catalog.objects if key.startswith(prefix)]
    if odd:
        raise OptimizerError(
            "optimizer state holds what is no tensor", [("key", key) for key in odd[:8]]
        )
    return moments


def _groups(everything: Mapping[str, object], optimizer: str, source: Path) -> tuple[Group, ...]:
    prefix = f"{optimizer}.param_groups"
    found: dict[int, dict[str, object]] = {}
    whole = everything.get(prefix)  # written by torch before 2.4
    if isinstance(whole, list):
        found = {n: dict(group) for n, group in enumerate(whole) if isinstance(group, Mapping)}
    flat: dict[str, dict[str, object]] = {}
    for key, value in everything.items():
        if not key.startswith(f"{prefix}."):
            continue
        rest = key[len(prefix) + 1 :]
        number, _, name = rest.partition(".")
        if number.isdigit() and (name == "params" or f"{prefix}.{number}.params" in everything):
            found.setdefault(int(number), {})[name] = value
        else:
            param, _, name = rest.rpartition(".")
            flat.setdefault(bare(param), {})[name] = value
    if flat:
        return _alike(flat)
    groups = []
    for _, values in sorted(found.items()):
        params = values.pop("params", [])
        if not isinstance(params, list) or not all(isinstance(param, str) for param in params):
            raise OptimizerError(
                "a parameter group does not name its parameters",
                [("source", source), ("found", repr(params)[:80])],
            )
        groups.append(Group(values, tuple(bare(param) for param in params)))
    return tuple(groups)


def _alike(flat: Mapping[str, Mapping[str, object]]) -> tuple[Group, ...]:
    """Parameters that are trained alike as one group, where every parameter has its own numbers.

    Source: torch 2.13 ``distributed/checkpoint/state_dict.py`` (``flatten_optimizer_state_dict``),
    which torchtitan sets.
    """
    groups: list[tuple[Mapping[str, object], list[str]]] = []
    for param, values in flat.items():
        same = next((params for known, params in groups if known == values), None)
        if same is None:
            groups.append((values, [param]))
        else:
            same.append(param)
    return tuple(Group(values, tuple(params)) for values, params in groups)
