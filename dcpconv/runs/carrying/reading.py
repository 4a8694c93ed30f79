"""Reads training checkpoints of every kind: headers, pickles without trust, and JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypedDict

from dcpconv.core.catalog import Catalog, Chunk, Extent, KeyPath, TensorEntry
from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap, keymaps
from dcpconv.formats import dcp, safetensors, torchfile
from dcpconv.formats.torchfile.archive import StoredTensor, read_archive, read_tensors
from dcpconv.formats.torchfile.nesting import key_of, nest
from dcpconv.plan.ties import differing
from dcpconv.runs.carrying import deepspeed
from dcpconv.runs.carrying.order import by_fqn, minimind_orders, trainer_orders
from dcpconv.runs.carrying.state import Group, Kind, Moments, OptimizerError, TrainingState, part_of
from dcpconv.sources.fitting import bare
from dcpconv.sources.recognition import Weights
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import understand
from dcpconv.stores.local import identities_of, read_json
from dcpconv.stores.schemes import refuse_scheme

_OPTIMIZERS: Final = ("optim", "optimizer")
_RNG: Final = re.compile(r"rng_state(_[0-9]{1,9})?\.pth")
_TRAIN_STATE: Final = re.compile(r"train_state_[0-9]{5,9}\.json")
_LARGEST_ARGUMENTS: Final = 1 << 20
"""Bytes of ``training_args.bin``; it is carried whole, because only its own classes read it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user says about a source: its naming, where its config is, its sizes."""

    family: str | None
    assets: Path | None
    sizes: Mapping[str, str]


def read_training_state(
    source: str | os.PathLike[str],
    *,
    from_: str | None = None,
    assets: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, str] | None = None,
) -> TrainingState:
    """What a training checkpoint holds, with the optimizer's state by FQN.

    Args:
        source: A MiniMind ``*_resume.pth``, a Hugging Face ``checkpoint-N``, a DCP directory with
            weights and optimizer, a Lingua step directory, or DeepSpeed's rank files.
        from_: Naming of its weights, where keys leave a choice.
        assets: Directory with the model's config, where the source has none.
        sizes: Numbers of the model (``n_heads``), where neither says.

    Raises:
        NotACheckpointError: There is no training checkpoint.
        OptimizerError: The optimizer's state cannot be told apart.
        FormatError: A file is damaged or unsafe.
    """
    refuse_scheme(source)
    path = Path(source)
    asked = Asked(from_, Path(assets) if assets else None, sizes or {})
    if path.is_file():
        return _read_minimind(path, asked)
    if (path / "trainer_state.json").is_file():
        # Of all files in it, before any is read: parts of two saves would be no step of a run.
        here = identities_of(path, [file.name for file in path.iterdir() if file.is_file()])
        found = _read_trainer(path, asked)
        return replace(found, identities={**found.identities, **here})
    if dcp.is_dcp(path):
        states = sorted(p for p in path.iterdir() if _TRAIN_STATE.fullmatch(p.name))
        kind: Kind = "lingua" if states else "dcp"
        found = _from_dcp(kind, path, dcp.read_catalog(path), asked)
        if not states:
            return found
        here = identities_of(path, [file.name for file in states])
        found = replace(found, identities={**found.identities, **here})
        return replace(found, beside={**found.beside, "train_states": [*map(read_json, states)]})
    if (directory := deepspeed.find(path)) is not None:
        return _from_deepspeed(directory, path, asked)
    raise NotACheckpointError(
        "this is no training checkpoint that we know",
        [
            ("path", path),
            ("expected", "MiniMind's *_resume.pth, a directory with trainer_state.json, or a DCP"),
        ],
        hint="weights without optimizer state are for `dcpconv convert`",
    )


def _read_minimind(path: Path, asked: Asked) -> TrainingState:
    catalog = torchfile.read_catalog(path)
    value = _nested(path, catalog)
    optimizer = value.get("optimizer")
    if not isinstance(value.get("model"), Mapping) or not isinstance(optimizer, Mapping):
        raise NotACheckpointError(
            "file holds no training state",
            [("file", path), ("expected", "model and optimizer"), ("found", ", ".join(value))],
            hint="weights alone are for `dcpconv convert`",
        )
    own = [table for name, table in keymaps().items() if name.startswith("minimind")]
    weights, spec, notes = _weights(catalog, "model", asked, tables=own)
    if weights.keymap is None:  # another trainer's file with the same containers
        weights, spec, notes = _weights(catalog, "model", asked)
    moments, groups = by_fqn(*_optimizer(optimizer, path), minimind_orders(weights), weights)
    beside = {key: item for key, item in value.items() if key not in {"model", "optimizer"}}
    if any(entry.dtype.name == "float16" for entry in weights.entries.values()):
        notes += ("MiniMind stores the weights in fp16: what fp32 weights had beyond it is lost",)
    return TrainingState(
        kind="minimind",
        source=path,
        root=catalog.path,
        **_with_ties(weights, spec, groups),
        moments=moments,
        groups=groups,
        beside=beside,
        notes=notes,
        identities=catalog.identities,
    )


def _read_trainer(path: Path, asked: Asked) -> TrainingState:
    beside: dict[str, object] = {"trainer_state": read_json(path / "trainer_state.json")}
    for file in sorted(path.iterdir()):
        name = file.stem
        if file.name in {"scheduler.pt", "scaler.pt"} or _RNG.fullmatch(file.name):
            beside[name] = _nested(file, _prefixed(torchfile.read_catalog(file), name))
        elif file.name == "training_args.bin" and file.stat().st_size <= _LARGEST_ARGUMENTS:
            beside[name] = file.read_bytes()
    if (path / "pytorch_model_fsdp_0").is_dir() and (path / "optimizer_0").is_dir():
        parts = [_below(path, name) for name in ("pytorch_model_fsdp_0", "optimizer_0")]
        found = _from_dcp("hf-trainer", path, _joined(path, parts), asked)
        return replace(found, beside={**found.beside, **beside})
    if not any((path / name).is_file() for name in ("optimizer.pt", "optimizer.bin")) and (
        directory := deepspeed.find(path)
    ):
        return replace(_from_deepspeed(directory, path, asked), kind="hf-trainer", beside=beside)
    optimizers = [p for n in ("optimizer.pt", "optimizer.bin") if (p := path / n).is_file()]
    if not optimizers:
        raise NotACheckpointError(
            "directory holds no optimizer state",
            [("directory", path), ("expected", "optimizer.pt, optimizer.bin or optimizer_0")],
            hint="weights alone are for `dcpconv convert`",
        )
    catalog = (
        safetensors.read_catalog(path) if safetensors.is_hf(path) else torchfile.read_catalog(path)
    )
    weights, spec, notes = _weights(catalog, "", asked)
    file = optimizers[0]
    optimizer = _nested(file, _prefixed(torchfile.read_catalog(file), "optimizer"))
    moments, groups = by_fqn(*_optimizer(optimizer, file), trainer_orders(weights), weights)
    return TrainingState(
        kind="hf-trainer",
        source=path,
        root=path,
        **_with_ties(weights, spec, groups),
        moments=moments,
        groups=groups,
        beside=beside,
        notes=notes,
    )


def _from_deepspeed(directory: Path, path: Path, asked: Asked) -> TrainingState:
    flat = deepspeed.read(directory, path)
    weights, spec, notes = _weights(flat.catalog, None, asked)
    return TrainingState(
        kind="deepspeed",
        source=path,
        root=path,
        **_with_ties(weights, spec, flat.groups),
        moments=flat.moments,
        groups=flat.groups,
        beside={},
        notes=(*flat.catalog.notes, *notes),
        identities=flat.catalog.identities,
    )


def _from_dcp(kind: Kind, source: Path, catalog: Catalog, asked: Asked) -> TrainingState:
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
    weights, spec, notes = _weights(part_of(catalog, chosen), model, asked)
    moments = _dcp_moments(catalog, optimizer)
    groups = _dcp_groups(everything, optimizer, source)
    strangers = sorted(set(moments) - set(weights.entries))
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
        **_with_ties(weights, spec, groups),
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


def _dcp_moments(catalog: Catalog, optimizer: str) -> Moments:
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


def _dcp_groups(
    everything: Mapping[str, object], optimizer: str, source: Path
) -> tuple[Group, ...]:
    prefix = f"{optimizer}.param_groups"
    found: dict[int, dict[str, object]] = {}
    whole = everything.get(prefix)  # written by torch before 2.4
    if isinstance(whole, list):
        found = {n: dict(group) for n, group in enumerate(whole) if isinstance(group, Mapping)}
    for key, value in everything.items():
        if not key.startswith(f"{prefix}."):
            continue
        number, _, name = key[len(prefix) + 1 :].partition(".")
        if not number.isdigit():
            raise OptimizerError(
                "parameter groups are flattened, so which parameters form a group is not known",
                [("source", source), ("key", key)],
                hint="save without flatten_optimizer_state_dict",
            )
        found.setdefault(int(number), {})[name] = value
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


def _weights(
    catalog: Catalog, root: str | None, asked: Asked, *, tables: list[Keymap] | None = None
) -> tuple[Weights, ModelSpec | None, tuple[str, ...]]:
    if root == "model":
        chosen = {k: e for k, e in catalog.tensors.items() if catalog.path_of(k)[0] == "model"}
        catalog = part_of(catalog, chosen)
    # What is under "model" may have wrappers of its own, such as DistributedDataParallel's.
    under = None if root == "model" else root
    said = Said(from_=asked.family, assets=asked.assets, sizes=asked.sizes)
    found = understand(catalog.source, said, catalog=catalog, root=under, tables=tables)
    return found.weights, found.spec, found.notes


class _Model(TypedDict):
    weights: Weights
    spec: ModelSpec | None


def _with_ties(weights: Weights, spec: ModelSpec | None, groups: tuple[Group, ...]) -> _Model:
    """The model with two equal tensors as one, where the optimizer knew only one of them."""
    trained = {name for group in groups for name in group.params}
    pairs = [
        (tie.key, tie.owner)
        for tie in (weights.keymap.ties if weights.keymap else ())
        if tie.owner in trained and tie.key not in trained and tie.key in weights.entries
    ]
    unequal = differing(weights, [pair for pair in pairs if pair[0] not in weights.tied])
    ties = dict(pair for pair in pairs if pair not in unequal)
    if ties and spec is not None:
        spec = spec.model_copy(update={"tied": True})
    return {"weights": replace(weights, tied={**ties, **weights.tied}), "spec": spec}


def _optimizer(
    value: Mapping[str, object], file: Path
) -> tuple[Mapping[object, object], list[Mapping[str, object]]]:
    state, groups = value.get("state"), value.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise FormatError(
            "optimizer state is not what an optimizer's state_dict() holds",
            [("file", file), ("expected", "state and param_groups"), ("found", ", ".join(value))],
        )
    return state, [group for group in groups if isinstance(group, Mapping)]


def _nested(file: Path, catalog: Catalog) -> dict[str, object]:
    """The saved value with the catalog's entries in place of tensors."""
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


def _prefixed(catalog: Catalog, name: str) -> Catalog:
    """The same catalog; entries get a key that tells their file, for error messages."""
    tensors = {
        key: replace(entry, key=f"{name}.{key}" if name else key)
        for key, entry in catalog.tensors.items()
    }
    return replace(catalog, tensors=tensors)


def _below(path: Path, name: str) -> Catalog:
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


def _joined(path: Path, parts: list[Catalog]) -> Catalog:
    def union(field: str) -> dict[str, object]:
        return {key: item for part in parts for key, item in getattr(part, field).items()}

    return Catalog(
        form="dcp",
        path=path,
        source=path,
        **{field: union(field) for field in _JOINED},  # type: ignore[arg-type]
    )
