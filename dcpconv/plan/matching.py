"""Matches the keys of a source against the table of a target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.errors import LayoutError
from dcpconv.core.layout import Placement
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap, Row
from dcpconv.families.sizes import Sizes, in_common, solve
from dcpconv.plan.block_scales import SCALE, factors_along, scales_of
from dcpconv.plan.coverage import Coverage, Fault, Piece, Target, as_stored
from dcpconv.sources.recognition import Weights


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
        source = weights.require_keymap()
        same = in_common(source, target)
        self.source, self.target = source.with_axes(same), target.with_axes(same)
        self.spec = spec
        self.omit_ties = omit_ties
        self.unknown: list[Fault] = []
        self.misshapen: list[Fault] = []
        self.missing: list[Fault] = []
        self.ignored: list[Fault] = []
        self.aside: list[Target] = []
        self.kept: list[Target] = []
        self.present: dict[str, tuple[Row, dict[str, int]]] = {}
        self.second: dict[str, str] = {}
        self.stand_in: dict[str, str] = {}
        self.consumed: set[str] = set()
        self.measures = Sizes(spec, (self.source, self.target))
        self.sizes = self.measures.usual
        rows = (*self.source.rows, *self.target.rows)
        self.first = dict.fromkeys((name for row in rows for name in row.pattern.names), 0)
        self.scales: dict[str, TensorEntry] = {}
        held = (self.source.part_of(key) for key in weights.entries)
        roles = {part.role for part in held if part is not None}
        self.absent = {part.role for part in self.source.kept} - roles
        self.derivable = {
            row.pattern.text: row
            for row in self.target.rows
            if row.pattern.text in self.target.derived
        }

    def run(self, refused: tuple[Fault, ...]) -> Coverage:
        self._read_source()
        is_tied = self._settle_ties()
        self._check_shapes()
        made = {target.key: target for target in self._targets(is_tied=is_tied)}
        made.update(self._derived(made))
        made.update((target.key, target) for target in self.kept)
        if self.scales:
            along, faults = factors_along(made, self.scales, self.weights.root, self.target.name)
            made.update(along)
            self.unknown.extend(faults)
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
            aside=tuple(self.aside),
            tied=tuple(self.second.items()),
            left=self.weights.rest,
            is_tied=is_tied,
        )

    def _in_source_order(self, targets: Iterable[Target]) -> tuple[Target, ...]:
        """Targets in the order of their first source tensor, so that a disk is read forwards."""
        place = {entry.key: n for n, entry in enumerate(self.weights.entries.values())}
        return tuple(
            sorted(
                targets,
                key=lambda target: place[target.pieces[0].entry.key] if target.pieces else -1,
            )
        )

    def _read_source(self) -> None:
        self.scales = scales_of(self.weights.entries)
        factors = {key + SCALE for key in self.scales}
        for key in self.weights.entries:
            if key in factors:
                continue
            match = self.source.match(key)
            if match is None and self.target.keeps_aside(key):
                self.kept.append(as_stored(key, self.weights.entries[key]))
            elif match is None:
                self.unknown.append(Fault(key, f"not in the table {self.source.name}"))
            elif match.kind in {"aside", "kept"} or self._is_of_a_part(key, match.row):
                self._set_aside(key, match.reason)
            elif match.row is None or key in self.weights.idle:
                self.ignored.append(Fault(key, self.weights.idle.get(key, match.reason)))
            elif reason := self.measures.beyond(self.source, match.row, match.indices):
                self.ignored.append(Fault(key, reason))
            elif match.kind == "tied":
                self.second[key] = match.row.pattern.key(match.indices)
            else:
                self.present[key] = (match.row, match.indices)
        dropped = {fault.key: fault.why for fault in self.ignored} if factors else {}
        self.ignored += [Fault(k + SCALE, dropped[k]) for k in self.scales if k in dropped]
        for name in self.first:
            seen = [at[name] for _, at in self.present.values() if name in at]
            if seen and name not in self.sizes:
                self.sizes[name] = max(seen) + 1

    def _is_of_a_part(self, key: str, row: Row | None) -> bool:
        """Whether a key that has a row is kept with its part, since the target has no such row."""
        if row is None or self.source.part_of(key) is None:
            return False
        return not any(slot in self.target.slots for slot in row.slots)

    def _set_aside(self, key: str, reason: str) -> None:
        """Keeps a tensor as it is: in its place where the target has one, else beside the rest."""
        entry = self.weights.entries[key]
        part = self.source.part_of(key)
        reason = reason or (part.role if part else "")
        place = key if self.target.keeps_aside(key) else None
        if part is not None:
            place = self.target.place_of(key.removeprefix(part.prefix), part.role) or place
        if place is not None:
            self.kept.append(replace(as_stored(place, entry), part=reason))
        else:
            self.aside.append(as_stored(key, entry))
            self.ignored.append(Fault(key, reason))

    def _settle_ties(self) -> bool:
        """Decides whether embedding and head are one tensor, and which key is the second name.

        The config decides where there is one; else a shared storage, a key that only tied models
        have, or a head that is absent.
        """
        entries, shared = self.weights.entries, self.weights.tied
        spec = self.spec
        is_tied = spec.tied and spec.head in {"lm", "none"} if spec else None
        for second, owner in self.source.tie_pairs().items():
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

    def _is_row(self, key: str) -> bool:
        return any(row.pattern.text == key for row in self.source.rows)

    def _row(self, key: str) -> Row:
        return next(row for row in self.source.rows if row.pattern.text == key)

    def _check_shapes(self) -> None:
        """Compares every stored shape with its layout, after solving for sizes no config gave."""
        declared = {*self.source.declared.axes, *self.target.declared.axes}
        if self.spec is None or not declared <= self.sizes.keys():
            self.sizes["two"] = 2
            for key, (row, _) in self.present.items():
                solve(row, self.weights.entries[key].shape, self.sizes)
        for key, (row, indices) in self.present.items():
            try:
                shape = self.measures.shape(row, indices)
            except LayoutError:
                continue  # needed only where elements change places; said there
            found = self.weights.entries[key].shape
            if found != shape:
                self.misshapen.append(Fault.unlike(key, list(shape), list(found), row.slots))

    def _targets(self, *, is_tied: bool) -> Iterator[Target]:
        kept = {target.key for target in self.kept}
        for row in self.target.rows:
            ranges = [range(self.sizes.get(name, 0)) for name in row.pattern.names]
            for values in product(*ranges):
                indices = dict(zip(row.pattern.names, values, strict=True))
                if not self._is_expected(row, indices, is_tied=is_tied):
                    continue
                if row.pattern.text in self.derivable and not self._has_all(row):
                    continue
                if kept and row.pattern.key(indices) in kept:
                    continue
                target = self._target(row, indices)
                if target is not None:
                    yield target

    def _derived(self, made: Mapping[str, Target]) -> dict[str, Target]:
        """Keys of the target that no tensor supplies and that follow from the config."""
        found = {}
        dtype = next((target.dtype for target in made.values()), None)
        for key, rule in self.target.derived.items():
            row = self.derivable.get(key)
            names = row.pattern.names if row else ()
            for values in product(*(range(self.sizes.get(name, 0)) for name in names)):
                indices = dict(zip(names, values, strict=True))
                name = row.pattern.key(indices) if row else key
                if name in made or (row and not self._is_needed(row, indices)):
                    continue
                shape = self.measures.shape(row, indices) if row else None
                from dcpconv.plan.derived import derive  # noqa: PLC0415 - few tables have rules

                derived = derive(rule, name, spec=self.spec, shape=shape, dtype=dtype)
                found[name] = derived
        return found

    def _is_needed(self, row: Row, indices: dict[str, int]) -> bool:
        if self.measures.says(row):
            return self.measures.has(row.when, indices)
        alike = (r for r in self.target.rows if r.when == row.when and r is not row)
        return any(self._supplies(slot, indices) for other in alike for slot in other.slots)

    def _is_expected(self, row: Row, indices: dict[str, int], *, is_tied: bool) -> bool:
        part = self.target.part_of(row.pattern.text)
        if part is not None and part.role in self.absent:
            return False  # a language model without its tower is asked for no tower
        is_idle = self.measures.idle(self.target, indices)
        if self.measures.says(row) and not is_idle:
            return self.measures.has(row.when, indices)
        if ("untied" if is_tied else "tied") in row.conditions:
            return False
        if not is_idle and row.conditions <= {"tied", "untied"} and not self.measures.lacks(row):
            return True
        return any(self._supplies(slot, indices) for slot in row.slots)

    def _has_all(self, row: Row) -> bool:
        return all(self.source.holders(slot) for slot in row.slots)

    def _supplies(self, slot: str, indices: dict[str, int]) -> bool:
        return any(
            srow.pattern.key({**self.first, **indices}) in self.weights.entries
            for srow, _ in self.source.holders(slot)
        )

    def _target(self, row: Row, indices: dict[str, int]) -> Target | None:
        key = row.pattern.key(indices)
        pieces: list[Piece] = []
        lacking: list[tuple[str, str]] = []
        relabelled: tuple[str, str] | None = None
        for term, slot in enumerate(row.slots):
            holders = self.source.holders(slot)
            if not holders:
                lacking.append(("", f"family {self.source.name} has no {slot}"))
                continue
            srow, sterm = self._holder(holders, indices)
            if srow.same_storage(row):
                entry = self._entry(srow.pattern.key(indices), lacking)
                if entry is not None:
                    pieces.append(Piece(entry))
                break
            if srow.axes(sterm) != row.axes(term):
                axes = f"{slot} has other axes in {self.source.name}: {srow.layout.text}"
                lacking.append(("", axes))
                continue
            if srow.layout.axes(sterm) != row.layout.axes(term):
                relabelled = relabelled or (srow.layout.text, row.layout.text)
            pieces.extend(self._pieces(row, term, srow, sterm, indices, lacking))
        if lacking:
            self.missing.append(Fault.lacking(key, lacking, row.slots))
            return None
        if not pieces:
            return None  # what would supply it is misshapen
        kinds = {piece.kind for piece in pieces}
        if len(kinds) > 1:
            why = f"made of tensors of different types: {', '.join(sorted(kinds))}"
            self.misshapen.append(Fault(key, why, row.slots))
            return None
        part = self.target.part_of(key)
        whole = pieces[0].wanted is None
        shape = pieces[0].entry.shape if whole else self.measures.shape(row, indices)
        return Target(
            key,
            shape,
            pieces[0].entry.dtype,
            tuple(pieces),
            relabelled=relabelled,
            slots=row.slots,
            indices=tuple(indices.values()),
            part=part.role if part else "",
        )

    def _holder(self, holders: list[tuple[Row, int]], indices: dict[str, int]) -> tuple[Row, int]:
        """The source row that is really there, of those that could hold the slot."""
        for srow, sterm in holders:
            if srow.pattern.key({**self.first, **indices}) in self.weights.entries:
                return srow, sterm
        return holders[0]

    def _pieces(
        self,
        row: Row,
        term: int,
        srow: Row,
        sterm: int,
        indices: dict[str, int],
        lacking: list[tuple[str, str]],
    ) -> Iterator[Piece]:
        wanted = self._place(row, term, indices)
        placed = self._place(srow, sterm, indices)
        free = [name for name in srow.pattern.names if name not in indices]
        fixed = {
            name: (value, value + 1)
            for name, value in indices.items()
            if name not in srow.pattern.names
        }
        for values in product(*(range(self.sizes[name]) for name in free)):
            more = dict(zip(free, values, strict=True))
            key = srow.pattern.key({**indices, **more})
            if key not in self.weights.entries and self.measures.idle(self.source, more):
                key = srow.pattern.key({**indices, **more, **dict.fromkeys(self.source.idle, 0)})
            entry = self._entry(key, lacking)
            if entry is not None and entry.shape == placed.shape:
                limit = {**fixed, **{name: (v, v + 1) for name, v in more.items()}}
                yield Piece(entry, placed, wanted, limit)

    def _place(self, row: Row, term: int, indices: dict[str, int]) -> Placement:
        try:
            return self.measures.place(row, term, indices)
        except LayoutError as error:
            raise LayoutError(
                error.headline,
                [("key", row.pattern.text), *error.facts],
                hint="--assets DIR names a config; --spec heads=N,kv_heads=M says it",
            ) from None

    def _entry(self, key: str, lacking: list[tuple[str, str]]) -> TensorEntry | None:
        key = self.stand_in.get(key, key)
        entry = self.weights.entries.get(key)
        if entry is None:
            lacking.append((key, f"needs {key}"))
        else:
            self.consumed.add(key)
        return entry

    def _why_unused(self, row: Row, indices: dict[str, int]) -> str:
        without = [slot for slot in row.slots if slot not in self.target.slots]
        if without:
            return f"family {self.target.name} has no {', '.join(without)}"
        for name, value in indices.items():
            if value >= self.sizes.get(name, value + 1):
                what = {"L": "layers", "E": "experts", "S": "shared experts"}.get(name, name)
                return f"the config has only {self.sizes[name]} {what}"
        if self.measures.says(row):
            has = self.measures.has
            words = {"tied": "tied head", "untied": "head of its own"}
            lacking = sorted(words.get(w, w) for w in row.conditions if not has(w, indices))
            if lacking:
                return f"the config says that the model has no {' and no '.join(lacking)}"
        return f"nothing in {self.target.name} uses it"
