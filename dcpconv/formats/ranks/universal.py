"""DeepSpeed universal checkpoints: one directory per parameter, one file per kind of state.

``zero/<key>/fp32.pt``, ``exp_avg.pt`` and ``exp_avg_sq.pt`` hold a tensor each, whole or flat; the
model file that is copied beside ``zero`` has shapes, buffers, frozen and tied parameters.

Source:
    deepspeed 0.19.8 ``checkpoint/ds_to_universal.py`` (``merge_tp_slices``, ``merge_zero3_slices``,
    ``_save_optimizer_state``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import Catalog, Identity, TensorEntry
from dcpconv.core.errors import FormatError
from dcpconv.formats.ranks.intervals import Segment, chunks_of
from dcpconv.formats.ranks.zero import whole_entry, with_model
from dcpconv.formats.ranks.zero_files import (
    MODEL_FILE,
    ModelFile,
    read_mapping,
    read_model_file,
    read_value,
    step_of,
)
from dcpconv.formats.torchfile.archive import StoredTensor

_WEIGHTS: Final = "fp32.pt"
_POINTER: Final = "latest_universal"


@dataclass(frozen=True, slots=True)
class Universal:
    """A universal checkpoint, without data.

    Attributes:
        directory: Where ``zero`` lies.
        models: The model files beside it, by rank.
        tensors: Key -> name of the state (``fp32``, ``exp_avg``) -> tensor; a number where the
            state is one.
        param_groups: The optimizer's numbers, without its parameters.
        identities: What every file was when it was read, by name.
    """

    directory: Path
    models: tuple[ModelFile, ...]
    tensors: Mapping[str, Mapping[str, TensorEntry | float]]
    param_groups: tuple[Mapping[str, object], ...]
    identities: Mapping[str, Identity]


def is_universal(path: Path) -> bool:
    """Whether a directory holds the parameters of a universal checkpoint."""
    zero = path / "zero"
    return zero.is_dir() and any((item / _WEIGHTS).is_file() for item in zero.iterdir())


def find(path: Path) -> Path | None:
    """The universal checkpoint that a directory is, or that is the newest or only one in it."""
    if not path.is_dir():
        return None
    if is_universal(path):
        return path
    inside = [item for item in path.iterdir() if item.is_dir() and is_universal(item)]
    pointer = path / _POINTER
    if pointer.is_file():
        chosen = path / pointer.read_text(errors="replace").strip()
        if chosen in inside:
            return chosen
    return inside[0] if len(inside) == 1 else None


def read_catalog(directory: Path, source: Path) -> Catalog:
    """The fp32 weights, and what the model file has beside them.

    Raises:
        FormatError: A file is damaged or missing, or a tensor is not of its parameter's size.
    """
    return replace(catalog_of(read_universal(directory), directory), source=source)


def catalog_of(found: Universal, root: Path) -> Catalog:
    """The weights of a universal checkpoint whose file names are relative to ``root``."""
    masters = {
        key: entry
        for key, states in found.tensors.items()
        if isinstance(entry := states.get("fp32"), TensorEntry)
    }
    tensors, tied = masters, dict[str, str]()
    if found.models:
        tensors, tied = with_model(found.directory, found.models, masters)
    note = "no model file is beside the parameters: buffers and frozen or tied parameters are lost"
    return Catalog(
        form="ranks",
        path=root,
        source=root,
        files={file: identity[2] for file, identity in found.identities.items()},
        tensors=tensors,
        tied=tied,
        notes=() if found.models else (note,),
        identities=found.identities,
    )


def read_universal(directory: Path, root: Path | None = None) -> Universal:
    """Reads the headers of every file.

    Args:
        directory: As ``find`` returns it.
        root: Directory that file names are relative to; ``directory`` by default.

    Raises:
        FormatError: A file is damaged or missing, or a tensor is not of its parameter's size.
    """
    root = root or directory
    models = _models(directory, root)
    shapes = {key: shape for model in models[:1] for g in model.groups for key, shape in g.items()}
    zero = directory / "zero"
    names = sorted(item.name for item in zero.iterdir() if (item / _WEIGHTS).is_file())
    missing = [key for key in shapes if key not in set(names)]
    if missing:
        raise FormatError(
            "parameters of a universal checkpoint are missing",
            [("directory", zero), *(("missing", f"{key}/{_WEIGHTS}") for key in missing[:8])],
        )
    files = {model.file: model.identity for model in models}
    tensors: dict[str, dict[str, TensorEntry | float]] = {}
    for key in [*shapes, *(name for name in names if name not in shapes)]:
        states: dict[str, TensorEntry | float] = {}
        for path in sorted((zero / key).glob("*.pt")):
            file = path.relative_to(root).as_posix()
            state, files[file] = _read_state(path, file, key, shapes.get(key))
            if state is not None:
                states[path.stem] = state
        tensors[key] = states
    return Universal(directory, models, tensors, _param_groups(zero), files)


def _models(directory: Path, root: Path) -> tuple[ModelFile, ...]:
    names = {
        int(match["rank"] or 0): path
        for path in directory.iterdir()
        if (match := MODEL_FILE.fullmatch(path.name))
    }
    return tuple(
        read_model_file(path, path.relative_to(root).as_posix())
        for _, path in sorted(names.items())
    )


def _read_state(
    path: Path, file: str, key: str, shape: tuple[int, ...] | None
) -> tuple[TensorEntry | float | None, Identity]:
    """A tensor in the shape of its parameter, or a number."""
    value, identity = read_value(path)
    stored = value.get("param") if isinstance(value, dict) else value
    if isinstance(stored, (int, float)):
        return float(stored), identity
    if not isinstance(stored, StoredTensor):
        return None, identity
    if shape is None or stored.shape in {(), shape}:
        return whole_entry(key, file, stored), identity
    if stored.shape != (math.prod(shape),) or not stored.is_contiguous:
        raise FormatError(
            "a tensor is not of its parameter's size",
            [("file", path), ("expected", list(shape)), ("found", list(stored.shape))],
        )
    segments: Sequence[Segment] = [Segment(0, stored.shape[0], file, stored.offset)]
    chunks = chunks_of(shape, segments, at=0, itemsize=stored.dtype.itemsize)
    return replace(whole_entry(key, file, stored), shape=shape, chunks=tuple(chunks)), identity


def _param_groups(zero: Path) -> tuple[Mapping[str, object], ...]:
    """The optimizer's numbers; stage 3 has no ``step.pt``, so the count of steps joins them."""
    path = zero / "optimizer_state.pt"
    if not path.is_file():
        return ()
    value, _ = read_mapping(path)
    groups = value.get("param_groups")
    step = step_of(path, value.get("optimizer_state_dict"))
    counted = {} if step is None else {"step": step}
    return tuple(
        {**group, **counted}
        for group in (groups if isinstance(groups, list) else [])
        if isinstance(group, dict)
    )
