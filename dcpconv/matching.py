"""Matches the keys of a source against the table of a target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from dcpconv.catalog import TensorEntry
from dcpconv.coverage import Coverage, Fault, Piece, Target
from dcpconv.errors import LayoutError
from dcpconv.keymaps import Keymap, Row
from dcpconv.layout import Placement
from dcpconv.recognition import Weights
from dcpconv.spec import ModelSpec

_INDEX_AXES = ("L", "E", "S")


def cover(
    weights: Weights,
    target: Keymap,
    *,
    spec: ModelSpec | None = None,
    omit_ties: bool = False,
    refused: tuple[Fault, ...] = (),
) -> Coverage:
    """The account of a conversion into another naming.

    Args:
        weights: The source, its naming known.
        target: The naming to reach.
        spec: The model's numbers; without it sizes come from the shapes where they can.
        omit_ties: Leave out second names that the target's files do not carry.
        refused: Features that the target cannot express, found by its config module.

    Raises:
        AmbiguousFamilyError: The source's naming is not known.
        LayoutError: A layout needs a size that neither config nor shapes reveal.
    """
    return _Account(weights, target, spec, omit_ties=omit_ties).run(refused)


class _Account:
    """One run of ``cover``: what has been seen so far."""

    def __init__(
        self, weights: Weights, target: Keymap, spec: ModelSpec | None, *, omit_ties: bool
    ) -> None:
        self.weights = weights
        self.source = weights.require_keymap()
        self.target = target
        self.spec = spec
        self.omit_ties = omit_ties
        self.unknown: list[Fault] = []
        self.misshapen: list[Fault] = []
        self.missing: list[Fault] = []
        self.ignored: list[Fault] = []
        self.present: dict[str, tuple[Row, dict[str, int]]] = {}
        self.second: dict[str, str] = {}
        self.stand_in: dict[str, str] = {}
        self.consumed: set[str] = set()
        self.sizes: dict[str, int] = dict(spec.axes()) if spec else {}
        self.placements: dict[tuple[Row, int], Placement] = {}
        self.shapes: dict[Row, tuple[int, ...]] = {}

    def run(self, refused: tuple[Fault, ...]) -> Coverage:
        self._read_source()
        is_tied = self._settle_ties()
        self._check_shapes()
        made = {target.key: target for target in self._targets(is_tied=is_tied)}
        for tie in self.target.ties if is_tied else ():
            owner = made.get(tie.owner)
            if owner is None or tie.key in made or (tie.omitted and self.omit_ties):
                continue
            made[tie.key] = Target(
                tie.key, owner.shape, owner.dtype, owner.pieces, tie.owner, owner.relabelled
            )
        for key, (row, indices) in self.present.items():
            if key not in self.consumed and key not in self.second:
                self.unknown.append(Fault(key, self._why_unused(row, indices), row.slots))
        return Coverage(
            source=self.source.name,
            target=self.target.name,
            targets=self._in_source_order(made.values()),
            missing=tuple(self.missing),
            unknown=tuple(self.unknown),
            misshapen=tuple(self.misshapen),
            refused=refused,
            ignored=tuple(self.ignored),
            tied=tuple(self.second.items()),
            left=self.weights.rest,
            is_tied=is_tied,
        )

    def _in_source_order(self, targets: Iterable[Target]) -> tuple[Target, ...]:
        """Targets in the order of their first source tensor, so that a disk is read forwards."""
        place = {entry.key: n for n, entry in enumerate(self.weights.entries.values())}
        return tuple(sorted(targets, key=lambda target: place[target.pieces[0].entry.key]))

    def _read_source(self) -> None:
        for key in self.weights.entries:
            match = self.source.match(key)
            if match is None:
                self.unknown.append(Fault(key, f"not in the table {self.source.name}"))
            elif match.row is None:
                self.ignored.append(Fault(key, match.reason))
            elif match.kind == "tied":
                self.second[key] = match.row.pattern.key(match.indices)
            else:
                self.present[key] = (match.row, match.indices)
        for name in _INDEX_AXES:
            seen = [at[name] for _, at in self.present.values() if name in at]
            if seen and name not in self.sizes:
                self.sizes[name] = max(seen) + 1

    def _settle_ties(self) -> bool:
        """Decides whether embedding and head are one tensor, and which key is the second name.

        The config decides where there is one; else a shared storage, a key that only tied models
        have, or a head that is absent.
        """
        entries, shared = self.weights.entries, self.weights.tied
        is_tied = self.spec.tied if self.spec else None
        for second, owner in self._tie_pairs().items():
            here, owner_here = second in entries, owner in entries
            if is_tied is None:
                if here and owner_here and self._is_row(second):
                    is_tied = shared.get(second, second) == shared.get(owner, owner)
                elif here or self._is_row(second):
                    is_tied = True
            if is_tied and here and owner_here:
                self.second[second] = owner
            elif is_tied and here:
                # Only the second name was kept (safetensors drops either): it stands for both.
                self.second.pop(second, None)
                self.present[second] = (self._row(owner), {})
                self.stand_in[owner] = second
        return bool(is_tied)

    def _tie_pairs(self) -> dict[str, str]:
        """``second name -> owner``: the table's own, and the head beside the embedding."""
        pairs = {tie.key: tie.owner for tie in self.source.ties}
        embeddings = [row.pattern.text for row, _ in self.source.holders("embed")]
        for row, _ in self.source.holders("head"):
            if row.when == "untied" and embeddings:
                pairs.setdefault(row.pattern.text, embeddings[0])
        return pairs

    def _is_row(self, key: str) -> bool:
        return any(row.pattern.text == key for row in self.source.rows)

    def _row(self, key: str) -> Row:
        return next(row for row in self.source.rows if row.pattern.text == key)

    def _check_shapes(self) -> None:
        """Compares every stored shape with its layout, after solving for sizes no config gave."""
        if self.spec is None:
            self.sizes["two"] = 2
            for key, (row, _) in self.present.items():
                solve(row, self.weights.entries[key].shape, self.sizes)
        for key, (row, _) in self.present.items():
            if row not in self.shapes:
                try:
                    self.shapes[row] = row.layout.shape(self.sizes)
                except LayoutError:
                    continue  # needed only where elements change places; said there
            found = self.weights.entries[key].shape
            if found != self.shapes[row]:
                expected = list(self.shapes[row])
                self.misshapen.append(Fault.unlike(key, expected, list(found), row.slots))

    def _targets(self, *, is_tied: bool) -> Iterator[Target]:
        for row in self.target.rows:
            ranges = [range(self.sizes.get(name, 0)) for name in row.pattern.names]
            for values in product(*ranges):
                indices = dict(zip(row.pattern.names, values, strict=True))
                if not self._is_expected(row, indices, is_tied=is_tied):
                    continue
                target = self._target(row, indices)
                if target is not None:
                    yield target

    def _is_expected(self, row: Row, indices: dict[str, int], *, is_tied: bool) -> bool:
        if row.when == "tied":
            return is_tied
        if row.when == "untied":
            return not is_tied
        if not row.when:
            return True
        if self.spec is not None:
            return _holds(self.spec, row.when, indices)
        return any(self._supplies(slot, indices) for slot in row.slots)

    def _supplies(self, slot: str, indices: dict[str, int]) -> bool:
        return any(
            srow.pattern.key({"L": 0, "E": 0, "S": 0, **indices}) in self.weights.entries
            for srow, _ in self.source.holders(slot)
        )

    def _target(self, row: Row, indices: dict[str, int]) -> Target | None:
        key = row.pattern.key(indices)
        pieces: list[Piece] = []
        lacking: list[str] = []
        relabelled: tuple[str, str] | None = None
        for term, slot in enumerate(row.slots):
            holders = self.source.holders(slot)
            if not holders:
                lacking.append(f"family {self.source.name} has no {slot}")
                continue
            srow, sterm = self._holder(holders, indices)
            if srow.same_storage(row):
                entry = self._entry(srow.pattern.key(indices), lacking)
                if entry is not None:
                    pieces.append(Piece(entry))
                break
            if srow.axes(sterm) != row.axes(term):
                lacking.append(f"{slot} has other axes in {self.source.name}: {srow.layout.text}")
                continue
            if srow.layout.axes(sterm) != row.layout.axes(term):
                relabelled = relabelled or (srow.layout.text, row.layout.text)
            pieces.extend(self._pieces(row, term, srow, sterm, indices, lacking))
        if lacking:
            self.missing.append(Fault(key, "; ".join(lacking), row.slots))
            return None
        if not pieces:
            return None  # what would supply it is misshapen
        dtypes = {piece.entry.dtype for piece in pieces}
        if len(dtypes) > 1:
            labels = ", ".join(sorted(dtype.label for dtype in dtypes))
            why = f"made of tensors of different types: {labels}"
            self.misshapen.append(Fault(key, why, row.slots))
            return None
        whole = pieces[0].wanted is None
        shape = pieces[0].entry.shape if whole else row.layout.shape(self.sizes)
        return Target(
            key,
            shape,
            pieces[0].entry.dtype,
            tuple(pieces),
            relabelled=relabelled,
            slots=row.slots,
            indices=tuple(indices.values()),
        )

    def _holder(self, holders: list[tuple[Row, int]], indices: dict[str, int]) -> tuple[Row, int]:
        """The source row that is really there, of those that could hold the slot."""
        for srow, sterm in holders:
            if srow.pattern.key({"E": 0, "S": 0, **indices}) in self.weights.entries:
                return srow, sterm
        return holders[0]

    def _pieces(
        self,
        row: Row,
        term: int,
        srow: Row,
        sterm: int,
        indices: dict[str, int],
        lacking: list[str],
    ) -> Iterator[Piece]:
        wanted = self._place(row, term)
        placed = self._place(srow, sterm)
        free = [name for name in srow.pattern.names if name not in indices]
        fixed = {
            name: (value, value + 1)
            for name, value in indices.items()
            if name not in srow.pattern.names
        }
        for values in product(*(range(self.sizes[name]) for name in free)):
            more = dict(zip(free, values, strict=True))
            entry = self._entry(srow.pattern.key({**indices, **more}), lacking)
            if entry is not None and entry.shape == placed.shape:
                limit = {**fixed, **{name: (v, v + 1) for name, v in more.items()}}
                yield Piece(entry, placed, wanted, limit)

    def _place(self, row: Row, term: int) -> Placement:
        found = self.placements.get((row, term))
        if found is None:
            found = self.placements[row, term] = row.layout.place(self.sizes, term)
        return found

    def _entry(self, key: str, lacking: list[str]) -> TensorEntry | None:
        key = self.stand_in.get(key, key)
        entry = self.weights.entries.get(key)
        if entry is None:
            lacking.append(f"needs {key}")
        else:
            self.consumed.add(key)
        return entry

    def _why_unused(self, row: Row, indices: dict[str, int]) -> str:
        without = [slot for slot in row.slots if slot not in self.target.slots]
        if without:
            return f"family {self.target.name} has no {', '.join(without)}"
        for name, value in indices.items():
            if value >= self.sizes.get(name, value + 1):
                what = {"L": "layers", "E": "experts"}.get(name, name)
                return f"the config has only {self.sizes[name]} {what}"
        if row.when and self.spec is not None:
            return f"the config says that the model has no {row.when}"
        return f"nothing in {self.target.name} uses it"


def _holds(spec: ModelSpec, when: str, indices: dict[str, int]) -> bool:
    """Whether a model has the tensors that a table marks with ``when``."""
    experts = spec.experts
    is_moe = experts is not None and indices.get("L", 0) >= experts.first_dense_layers
    if when == "moe":
        return is_moe
    if when == "dense":
        return not is_moe
    if when == "shared_experts":
        return is_moe and experts is not None and experts.shared_count > 0
    return when in spec.features()


def expected(
    table: Keymap, spec: ModelSpec
) -> Iterator[tuple[str, tuple[int, ...] | None, tuple[str, ...]]]:
    """Key, shape and slots of every tensor that a model has in a naming, from its numbers alone.

    The shape is ``None`` where a layout names an axis whose size the config does not say.  Second
    names of a tied tensor are not among them.
    """
    sizes = spec.axes()
    for row in table.rows:
        try:
            shape = row.layout.shape(sizes)
        except LayoutError:
            shape = None
        for values in product(*(range(sizes.get(name, 0)) for name in row.pattern.names)):
            indices = dict(zip(row.pattern.names, values, strict=True))
            exists = {"": True, "tied": spec.tied, "untied": not spec.tied}.get(row.when)
            if exists if exists is not None else _holds(spec, row.when, indices):
                yield row.pattern.key(indices), shape, row.slots


def solve(row: Row, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Adds to ``sizes`` what a stored shape reveals: dims with exactly one axis of unknown size.

    A fused dim such as ``(h e)`` reveals nothing by itself: 512 rows may be 8 heads of 64 or 16
    of 32.
    """
    if row.layout.terms > 1 or len(row.layout.nodes) != len(shape):
        return
    for node, length in zip(row.layout.nodes, shape, strict=True):
        names = _axis_names(node)
        unknown = [name for name in names if name not in sizes]
        if len(unknown) != 1 or names.count(unknown[0]) != 1:
            continue
        known = 1
        for name in names:
            known *= sizes.get(name, 1)
        if known and length % known == 0:
            sizes[unknown[0]] = length // known
    if "p" in sizes:
        sizes.setdefault("e", 2 * sizes["p"])
    elif sizes.get("e", 1) % 2 == 0:
        sizes["p"] = sizes["e"] // 2


def _axis_names(node: object) -> list[str]:
    nodes = getattr(node, "nodes", None)
    if nodes is not None:
        return [name for child in nodes for name in _axis_names(child)]
    name = getattr(node, "name", "1")
    return [] if name.isdigit() else [name]
