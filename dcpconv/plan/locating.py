"""Where the tensors that an adapter speaks of are stored in its base, whatever their names are.

Adapters spell the base as the model in memory did.  Where the base is stored in another naming, the
tables say where the rows and columns of each matrix lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dcpconv.core.catalog import Catalog, Lane, TensorEntry
from dcpconv.core.errors import DcpconvError, KeymapError
from dcpconv.core.layout import Placement
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap, resolve_family, split_key
from dcpconv.plan.coverage import Piece
from dcpconv.plan.matching import cover
from dcpconv.sources.adapters.record import Adapter
from dcpconv.sources.recognition import Weights, recognise

_PREFIXES = ("", "model.", "base_model.", "transformer.")
"""What stands before the keys of one class of transformers and not before those of another."""


@dataclass(frozen=True, slots=True)
class MatrixPlace:
    """Where a matrix, or a part of it, is stored.

    Attributes:
        entry: The stored tensor.
        shape: Of the matrix, as the adapter knows it.
        rows: Which of its rows the stored tensor has, where not all in the same order.
        columns: Likewise.
        is_turned: The stored tensor has its columns as rows.
        expert: Which matrix it is of the adapter's stack, where the base stores one by one.
        matrix: Which one it is of the base's stack, where the adapter knows one by one.
    """

    entry: TensorEntry
    shape: tuple[int, ...]
    rows: Lane | None = None
    columns: Lane | None = None
    is_turned: bool = False
    expert: int | None = None
    matrix: int | None = None


@dataclass
class Finder:
    """Finds the stored tensors behind the keys of one adapter."""

    weights: Weights
    adapter: Adapter
    spec: ModelSpec | None
    architecture: str | None

    def places(self, key: str) -> list[MatrixPlace]:
        """Where a tensor is stored; nothing where the base does not have it."""
        entry = self._entry(key)
        if entry is not None:
            return [MatrixPlace(entry, entry.shape)]
        for prefix in _PREFIXES:
            for other in (prefix + key, key.removeprefix(prefix)):
                if other in self._made:
                    shape, pieces = self._made[other]
                    found = [_lanes(piece, shape) for piece in pieces]
                    return [] if None in found else [place for place in found if place]
        return []

    def _entry(self, key: str) -> TensorEntry | None:
        entries = self.weights.entries
        names = dict.fromkeys(
            name for prefix in _PREFIXES for name in (prefix + key, key.removeprefix(prefix))
        )
        found = [name for name in names if name in entries]
        return entries[found[0]] if key in found or len(found) == 1 else None

    def stored_key(self, key: str) -> str:
        """What a key that the base lacks would be stored as."""
        return self.weights.root + key

    def together(self, entry: TensorEntry) -> list[TensorEntry]:
        """A tensor and those that are the same one under another name, as PEFT changes all."""
        names = {entry.key} | self._ties.get(entry.key, set())
        return [one for one in self.weights.entries.values() if one.key in names]

    def owner_of(self, key: str) -> TensorEntry | None:
        """The tensor that a name which is not stored stands for, in a tied model."""
        return self.unstored().get(key)

    def unstored(self) -> dict[str, TensorEntry]:
        """Names of a tied model that are not stored, and the tensors that they stand for."""
        table, entries = self.weights.keymap, self.weights.entries
        if table is None or self.spec is None or not self.spec.tied:
            return {}
        pairs = table.tie_pairs().items()
        return {key: entries[o] for key, o in pairs if key not in entries and o in entries}

    @cached_property
    def _ties(self) -> dict[str, set[str]]:
        entries = self.weights.entries
        pairs = set(self.weights.tied.items())
        if self.spec is not None and self.spec.tied and self.weights.keymap is not None:
            pairs |= set(self.weights.keymap.tie_pairs().items())
        found: dict[str, set[str]] = {}
        for key, owner in pairs:
            if key in entries and owner in entries:
                names = {entries[key].key, entries[owner].key}
                for name in names:
                    found.setdefault(name, set()).update(names)
        return found

    @cached_property
    def _made(self) -> Mapping[str, tuple[tuple[int, ...], tuple[Piece, ...]]]:
        """What the tables make of the base, in the adapter's naming."""
        table = self._table()
        if table is None or self.weights.keymap is None or table is self.weights.keymap:
            return {}
        try:
            coverage = cover(self.weights, table, spec=self.spec)
        except DcpconvError:
            return {}
        return {target.key: (target.shape, target.pieces) for target in coverage.targets}

    def _table(self) -> Keymap | None:
        keys = [low_rank.key for low_rank in self.adapter.updates] or list(self.adapter.given)
        some: TensorEntry | None = next(iter(self.adapter.catalog.tensors.values()), None)
        if some is None:
            return None
        told = {key: replace(some, key=key) for key in keys}
        pretended = Catalog("torch", Path(), Path("adapter"), {}, told)
        try:
            own = self.weights.keymap
            architecture = self.architecture
            if architecture is None and own is not None and own.architectures:
                architecture = own.architectures[0]
            tables = [resolve_family(name, architecture) for name in ("hf", "hf-memory")]
        except KeymapError:
            tables = []
        known = [sum(table.knows(split_key(key)[0]) for key in keys) for table in tables]
        if any(known):
            return tables[known.index(max(known))]
        return recognise(pretended, spec=self.spec).keymap


def _lanes(piece: Piece, shape: tuple[int, ...]) -> MatrixPlace | None:
    """Where a piece of a matrix lies in the stored tensor; ``None`` where it is no matrix there."""
    entry = piece.entry
    if piece.placed is None or piece.wanted is None:
        return MatrixPlace(entry, shape)
    stored, wanted = piece.placed, piece.wanted
    if 3 in {len(shape), len(entry.shape)}:
        return _lanes_of_stack(piece, shape)
    if not len(shape) == len(entry.shape) <= 2:
        return None
    straight = [_lane(stored, wanted, dim, dim, piece) for dim in range(len(shape))]
    if all(straight):
        rows = straight[0] if len(shape) == 2 else None
        return MatrixPlace(entry, shape, rows, straight[-1])
    turned = [_lane(stored, wanted, dim, 1 - dim, piece) for dim in range(len(shape))]
    if len(shape) == 2 and all(turned):
        return MatrixPlace(entry, shape, turned[0], turned[1], is_turned=True)
    return None


def _lanes_of_stack(piece: Piece, shape: tuple[int, ...]) -> MatrixPlace | None:
    """The same where either side stacks matrices, such as those of experts."""
    entry, stored, wanted = piece.entry, piece.placed, piece.wanted
    assert stored is not None  # noqa: S101
    assert wanted is not None  # noqa: S101
    here, there = len(entry.shape) - 2, len(shape) - 2
    if {here, there} - {0, 1}:
        return None
    expert = _index(wanted, piece) if not here else None
    matrix = _index(stored, piece) if not there else None
    if here and there:
        along = _lane(stored, wanted, 0, 0, piece)
        if along != Lane(0, 0, ((shape[0], 1, 1),)):
            return None
    elif expert is None and matrix is None:
        return None
    for is_turned in (False, True):
        rows = _lane(stored, wanted, here, there + is_turned, piece)
        columns = _lane(stored, wanted, here + 1, there + 1 - is_turned, piece)
        if rows is not None and columns is not None:
            return MatrixPlace(entry, shape, rows, columns, is_turned, expert, matrix)
    return None


def _index(placement: Placement, piece: Piece) -> int | None:
    """Where a piece lies along the first dim; ``None`` where it is longer than one step there."""
    index, steps = placement.dims[0]
    for axis, step in steps:
        low, high = piece.limit.get(axis, (0, placement.lengths[axis]))
        if high - low != 1:
            return None
        index += low * step
    return index


def _lane(stored: Placement, wanted: Placement, here: int, there: int, piece: Piece) -> Lane | None:
    """How an axis of the stored tensor runs along one of the wanted; ``None`` where it does not."""
    base, steps = stored.dims[here]
    other, others = wanted.dims[there]
    move, moves = dict(steps), dict(others)
    axes = []
    for axis in dict.fromkeys((*move, *moves)):
        low, high = piece.limit.get(axis, (0, {**stored.lengths, **wanted.lengths}[axis]))
        base += low * move.get(axis, 0)
        other += low * moves.get(axis, 0)
        if high - low == 1:
            continue
        if axis not in move or axis not in moves:
            return None
        axes.append((high - low, move[axis], moves[axis]))
    return Lane(base, other, tuple(axes))
