"""A training run at one step: weights, optimizer state by FQN, and everything beside them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from dcpconv.core.catalog import Catalog, Identity, KeyPath, TensorEntry
from dcpconv.core.errors import DcpconvError
from dcpconv.formats.torchfile.nesting import DictKey
from dcpconv.formats.torchfile.unpickling import Call, Instance
from dcpconv.sources.recognition import Weights
from dcpconv.sources.understanding import Source

Kind = Literal[
    "minimind",
    "hf-trainer",
    "dcp",
    "lingua",
    "torchtitan",
    "deepspeed",
    "fsdp",
    "torch-checkpointing",
]
"""Whose checkpoint it is; ``dcp`` is what ``dcp.save`` writes of ``{"model", "optim", ...}``."""

KINDS: Final[tuple[Kind, ...]] = ("minimind", "hf-trainer", "dcp", "lingua", "torchtitan")
"""What can be written."""

UNSPLIT: Final = frozenset({"trainer_state", "train_states", "training_args"})
"""Entries that stay one object in a DCP: logs of thousands of lines would become as many keys."""

Moments = Mapping[str, Mapping[str, TensorEntry | float]]
"""Optimizer state: bare FQN -> name (``exp_avg``) -> tensor, or a number where an optimizer counts
its steps in one."""


class OptimizerError(DcpconvError, ValueError):
    """Optimizer state that cannot be told apart, or cannot be carried; facts list all of it."""


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group: its numbers, and the bare FQNs in it, in the optimizer's order."""

    values: Mapping[str, object]
    params: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What a training checkpoint holds, without data.

    Attributes:
        kind: Whose checkpoint it is.
        source: What the user named.
        root: Directory that every extent is relative to.
        model: The weights, their naming and the model's numbers, as they were understood.
        moments: Optimizer state.
        groups: Parameter groups.
        beside: Everything else by top-level name: nested values with a ``TensorEntry`` in place of
            every tensor.
        notes: What a user should know.
        identities: What every file was when it was read, by its path relative to ``root``.
    """

    kind: Kind
    source: Path
    root: Path
    model: Source
    moments: Moments
    groups: tuple[Group, ...]
    beside: Mapping[str, object]
    notes: tuple[str, ...] = ()
    identities: Mapping[str, Identity] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """The weights and their naming."""
        return self.model.weights


def holds_tensor(value: object) -> bool:
    """Whether a nested value holds a tensor, at any depth of mappings and lists."""
    if isinstance(value, Mapping):
        return any(map(holds_tensor, value.values()))
    if isinstance(value, list):
        return any(map(holds_tensor, value))
    return isinstance(value, TensorEntry)


def is_plain(value: object) -> bool:
    """Whether ``torch.load(weights_only=True)`` takes it: nothing of a class of its own."""
    if isinstance(value, Mapping):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_plain, value))
    return not isinstance(value, (Call, Instance))


def split_for_dcp(path: KeyPath, value: object) -> Iterator[tuple[KeyPath, object]]:
    """Leaves under the keys that ``dcp.save`` gives them, and its lost ones besides.

    torch drops empty containers; a leaf of ours keeps them, for ``scaler: {}`` means something.

    Source: torch 2.13 ``torch/distributed/checkpoint/_traverse.py``.
    """
    if isinstance(value, Mapping) and value and path[-1] not in UNSPLIT:
        if all(isinstance(key, str) for key in value) or holds_tensor(value):
            for key, item in value.items():
                yield from split_for_dcp((*path, str(key)), item)
            return
    elif isinstance(value, list) and path[-1] not in UNSPLIT and _is_entered(value):
        for index, item in enumerate(value):
            yield from split_for_dcp((*path, index), item)
        return
    yield path, value


def _is_entered(value: list[object]) -> bool:
    """Whether a list has keys of its own: not for empty mappings alone, which torch would read back
    as a list of plain values, under the key of the list (``lr_lambdas``)."""
    return any(
        isinstance(item, TensorEntry)
        or (isinstance(item, Mapping) and bool(item))
        or (isinstance(item, list) and _is_entered(item))
        for item in value
    )


def split_for_file(path: KeyPath, value: object) -> Iterator[tuple[KeyPath, object]]:
    """Leaves of a ``torch.save`` file: containers are entered only on the way to a tensor."""
    if holds_tensor(value):
        if isinstance(value, Mapping):
            for key, item in value.items():
                part = DictKey(key) if isinstance(key, int) else str(key)
                yield from split_for_file((*path, part), item)
            return
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield from split_for_file((*path, index), item)
            return
    yield path, value


_CODES: Final = {"float32": "f", "float64": "d", "float16": "e", "int64": "q", "int32": "i"}


def read_scalar(root: Path, entry: TensorEntry) -> float | None:
    """The value of a 0-d tensor; ``None`` for an element type that is not counted in."""
    code = _CODES.get(entry.dtype.name)
    if code is None or len(entry.chunks) != 1:
        return None
    extent = entry.chunks[0].extent
    descriptor = os.open(root / extent.file, os.O_RDONLY)
    try:
        data = os.pread(descriptor, entry.dtype.itemsize, extent.offset)
    finally:
        os.close(descriptor)
    return float(struct.unpack(f"<{code}", data)[0])


def part_of(catalog: Catalog, tensors: Mapping[str, TensorEntry]) -> Catalog:
    """A catalog of some of the tensors and none of the objects."""
    return Catalog(
        form=catalog.form,
        path=catalog.path,
        source=catalog.source,
        files=catalog.files,
        identities=catalog.identities,
        tensors=tensors,
        paths={key: path for key, path in catalog.paths.items() if key in tensors},
        tied={
            key: owner for key, owner in catalog.tied.items() if key in tensors and owner in tensors
        },
    )
