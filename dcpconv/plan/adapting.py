"""Which stored tensors of a base an adapter changes: every pair has its matrix, or an error.

Adapters spell the base as the model in memory did.  Where the base is stored in another naming, the
tables say where the rows and columns of each matrix lie, and the factors are rearranged: the
product is the same numbers in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dcpconv.core.catalog import TensorEntry, Update
from dcpconv.core.dtypes import FP4
from dcpconv.core.errors import CoverageError
from dcpconv.core.spec import ModelSpec
from dcpconv.plan.account import Aim
from dcpconv.plan.coverage import Fault
from dcpconv.plan.locating import Finder, MatrixPlace
from dcpconv.sources.adapters.naming import Weighed
from dcpconv.sources.adapters.record import LowRank
from dcpconv.sources.recognition import Weights

_INPUTS_FIRST = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""Architectures whose stacked experts are stored inputs by outputs.  Source: transformers 5.23
``modeling_gpt_oss.py`` and others, ``use_experts_implementation(is_transposed=True)``."""


@dataclass(slots=True)
class Merged:
    """What adapters do to a base.

    Attributes:
        updates: By stored key, in order.
        added: Tensors that the base does not store: a head that was tied, by bare key.
        owners: Whose bytes they are listed with.
        found: ``(key as the adapter spells it, stored keys)`` of everything that has its place.
        missing: What has none.
        misshapen: What has another shape, or cannot be changed.
        notes: What a user should know.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    added: dict[str, TensorEntry] = field(default_factory=dict)
    owners: dict[str, TensorEntry] = field(default_factory=dict)
    found: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    missing: list[Fault] = field(default_factory=list)
    misshapen: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def say(self, note: str) -> None:
        """Notes something once."""
        if note not in self.notes:
            self.notes.append(note)


def adapted(
    weights: Weights,
    adapters: Sequence[Weighed],
    *,
    spec: ModelSpec | None,
    architecture: str | None,
    dequantize: bool = False,
    undone: str = "nothing was written",
) -> tuple[Weights, tuple[str, ...]]:
    """The weights with what adapters do to them, and what to say about it.

    Args:
        weights: The base.
        adapters: In the order in which they are added.
        spec: The base's numbers, where they are known.
        architecture: What the base's parameter file names, whether its numbers are known or not.
        dequantize: Whether weights in scaled blocks are multiplied out.
        undone: What did not happen where they do not fit.

    Raises:
        CoverageError: Something in an adapter has no place in the base; all of it is listed.
    """
    if not adapters:
        return weights, ()
    merged = merge_of(
        weights, adapters, spec=spec, architecture=architecture, dequantize=dequantize
    )
    if merged.missing or merged.misshapen:
        counts = [
            f"{len(faults)} {label}"
            for label, faults in (("missing", merged.missing), ("misshapen", merged.misshapen))
            if faults
        ]
        raise CoverageError(
            f"the adapter does not fit the base: {', '.join(counts)}; {undone}",
            [
                ("base", weights.catalog.source),
                *(("adapter", one.adapter.path) for one in adapters),
                *(("missing", f"{fault.key}  {fault.why}") for fault in merged.missing),
                *(("misshapen", f"{fault.key}  {fault.why}") for fault in merged.misshapen),
            ],
            hint=_hint(adapters, weights),
        )
    return _changed(weights, merged), (*_told(adapters), *merged.notes)


def merged_into(
    aim: Aim, adapters: Sequence[Weighed], *, undone: str = "nothing was written"
) -> tuple[Aim, tuple[str, ...]]:
    """The aim with adapters merged into its source, and what to say about it.

    Raises:
        CoverageError: An update has no matrix in the base, or one of another shape; lists all.
    """
    if not adapters:
        return aim, ()
    weights, notes = adapted(
        aim.weights,
        adapters,
        spec=aim.spec,
        architecture=aim.source.architecture,
        dequantize=aim.source.said.dequantize,
        undone=undone,
    )
    source = replace(aim.source, catalog=weights.catalog)
    return replace(aim, source=source, weights=weights), notes


def merge_of(
    weights: Weights,
    adapters: Sequence[Weighed],
    *,
    spec: ModelSpec | None,
    architecture: str | None,
    dequantize: bool = False,
) -> Merged:
    """What adapters do to a base, faults and all."""
    merged = Merged()
    replaced: dict[str, Path] = {}
    for one in adapters:
        finder = Finder(weights, one.adapter, spec, architecture)
        for low_rank in one.adapter.updates:
            _add(merged, finder, low_rank, one.weight, dequantize=dequantize)
        for key, entry in one.adapter.given.items():
            if one.weight != 1:
                why = f"is replaced whole, which has no weight {one.weight:g}"
                merged.misshapen.append(Fault(key, why))
            elif key in replaced:
                why = f"is replaced by {replaced[key]} and by {one.adapter.path}"
                merged.misshapen.append(Fault(key, why))
            else:
                replaced[key] = one.adapter.path
                _give(merged, finder, key, entry, dequantize=dequantize)
        if not one.adapter.keeps_ties:
            _part(merged, finder)
    return merged


def _part(merged: Merged, finder: Finder) -> None:
    """Gives a head that was tied the base's own values where its owner has been replaced, as PEFT
    leaves it: ``ModulesToSaveWrapper`` trains a copy of the embedding, and the head keeps the old.
    """
    replaced = {key for key, found in merged.updates.items() if any(one.given for one in found)}
    for key, owner in finder.unstored().items():
        if owner.key in replaced and key not in merged.added:
            merged.owners[key] = owner
            merged.added[key] = replace(owner, key=finder.stored_key(key), updates=())
            merged.say(f"{key} keeps the values of the base, of which {owner.key} has others now")


def _add(
    merged: Merged, finder: Finder, low_rank: LowRank, weight: float, *, dequantize: bool
) -> None:
    places = finder.places(low_rank.key)
    if not places:
        merged.missing.append(Fault(low_rank.key, "the base has no such matrix"))
        return
    update = _update(low_rank, places[0].shape, finder.architecture, weight, merged)
    if update is None:
        return
    stored = []
    for place in places:
        if not _is_fit(merged, low_rank.key, place, dequantize=dequantize, update=update):
            return
        together = finder.together(place.entry)
        if len(together) > 1:
            told = " and ".join(sorted(entry.key for entry in together))
            merged.say(f"{told} are one tensor: both change, as PEFT merges them")
        for entry in together:
            merged.updates.setdefault(entry.key, []).append(_placed(update, place))
            stored.append(entry.key)
    merged.found.append((low_rank.key, tuple(stored)))
    if low_rank.bias is not None:
        key = f"{low_rank.module}.bias"
        biases = finder.places(key)
        if not biases:
            merged.missing.append(Fault(key, "the adapter adds to a bias that the base lacks"))
        for place in biases:
            if place.shape != low_rank.bias.shape:
                shape = list(low_rank.bias.shape)
                merged.misshapen.append(Fault.unlike(key, list(place.shape), shape))
            elif _is_fit(merged, key, place, dequantize=dequantize):
                vector = Update(scale=update.scale, right=low_rank.bias)
                merged.updates.setdefault(place.entry.key, []).append(_placed(vector, place))


def _update(
    low_rank: LowRank,
    shape: tuple[int, ...],
    architecture: str | None,
    weight: float,
    merged: Merged,
) -> Update | None:
    """The update of the matrix as the adapter spells the base."""
    a, b = low_rank.a, low_rank.b
    is_flipped = low_rank.is_embedding or low_rank.fan_in_fan_out
    experts = 1
    outputs, inputs = b.shape[0], a.shape[1]
    product = (inputs, outputs) if is_flipped else (outputs, inputs)
    if len(shape) == 3 and a.shape[0] == low_rank.rank * shape[0]:
        experts = shape[0]
        turned = (inputs, outputs) == shape[1:]
        if inputs == outputs and architecture is None:
            why = "square experts, and no parameter file says whether inputs or outputs come first"
            merged.misshapen.append(Fault(low_rank.key, why))
            return None
        is_flipped = turned and (inputs != outputs or architecture in _INPUTS_FIRST)
        product = shape[1:] if turned else product
        product = (experts, *product)  # type: ignore[assignment]
    magnitude = low_rank.magnitude
    if magnitude is not None and (magnitude.numel != outputs or experts > 1):
        why = f"{magnitude.numel} magnitudes for {outputs} outputs"
        merged.misshapen.append(Fault(low_rank.key, why))
        return None
    if shape != product:
        merged.misshapen.append(Fault.unlike(low_rank.key, list(shape), list(product)))
        return None
    left, right = (a, b) if is_flipped else (b, a)
    return Update(
        scale=low_rank.scale * weight,
        left=left,
        right=right,
        is_flipped=is_flipped,
        experts=experts,
        magnitude=magnitude,
        by_column=is_flipped,
    )


def _placed(update: Update, place: MatrixPlace) -> Update:
    """The update of the matrix as the base stores it."""
    if place.is_turned:
        update = replace(
            update,
            left=update.right,
            right=update.left,
            is_flipped=not update.is_flipped,
            by_column=not update.by_column,
        )
    return replace(
        update,
        rows=place.rows,
        columns=place.columns,
        expert=place.expert,
        matrix=place.matrix,
    )


def _give(
    merged: Merged, finder: Finder, key: str, entry: TensorEntry, *, dequantize: bool
) -> None:
    places = finder.places(key)
    owner = None if places else finder.owner_of(key)
    if owner is not None:
        # A head that was tied and now has values of its own.
        merged.owners[key] = owner
        merged.added[key] = replace(owner, key=finder.stored_key(key), updates=())
        places = [MatrixPlace(merged.added[key], owner.shape)]
    if not places:
        merged.missing.append(Fault(key, "the adapter replaces what the base does not have"))
        return
    if places[0].shape != entry.shape:
        merged.misshapen.append(Fault.unlike(key, list(places[0].shape), list(entry.shape)))
        return
    if finder.adapter.keeps_ties:
        places = [*places, *_tied_places(finder, places)]
    stored = []
    for place in places:
        is_unlike = place.is_turned or len(place.entry.shape) != len(entry.shape)
        if is_unlike or not _is_fit(merged, key, place, dequantize=dequantize):
            if is_unlike:
                how = "turned" if place.is_turned else "with another number of dims"
                merged.misshapen.append(Fault(key, f"is stored {how}, as {place.entry.key}"))
            return
        update = Update(given=entry, rows=place.rows, columns=place.columns)
        merged.updates.setdefault(place.entry.key, []).append(update)
        stored.append(place.entry.key)
    merged.found.append((key, tuple(stored)))


def _tied_places(finder: Finder, places: Sequence[MatrixPlace]) -> Iterator[MatrixPlace]:
    """The same places under the other names of tied tensors, unless the adapter gives these too."""
    own = {place.entry.key for key in finder.adapter.given for place in finder.places(key)}
    for place in places:
        for other in finder.together(place.entry):
            if other.key not in own:
                yield replace(place, entry=other)


def _is_fit(
    merged: Merged, key: str, place: MatrixPlace, *, dequantize: bool, update: Update | None = None
) -> bool:
    entry = place.entry
    why = ""
    is_plain = entry.dtype.is_floating_point and (entry.dtype.itemsize > 1 or dequantize)
    if not is_plain and entry.factors is None:
        why = f"is stored as {entry.dtype.label}; --dequantize multiplies fp8 weights out"
    elif entry.dtype is FP4:
        why = "is stored as MXFP4; --dequantize makes a base of its own, to merge into afterwards"
    elif update is not None and update.magnitude is not None and entry.dtype.itemsize == 1:
        why = "has magnitudes (DoRA), and the norms of weights in scaled blocks are not taken"
    elif update is not None and update.magnitude is not None and place.matrix is not None:
        why = f"has magnitudes (DoRA), and is one of those stacked in {entry.key}"
    elif len(entry.shape) > 3 or not entry.shape:
        why = f"has the shape {list(entry.shape)}; only matrices, stacks and vectors are changed"
    if why:
        merged.misshapen.append(Fault(key, why))
    return not why


def _changed(weights: Weights, merged: Merged) -> Weights:
    added = {entry.key: entry for entry in merged.added.values()}
    updates = {key: tuple(found) for key, found in merged.updates.items()}
    replaced = {key for key, found in updates.items() if any(one.given for one in found)}

    def change(entry: TensorEntry) -> TensorEntry:
        more = updates.get(entry.key)
        return replace(entry, updates=(*entry.updates, *more)) if more else entry

    catalog = weights.catalog
    tensors = {key: change(entry) for key, entry in {**catalog.tensors, **added}.items()}
    stored = {bare: entry.key for bare, entry in weights.entries.items()}
    paths = {
        entry.key: (*catalog.path_of(merged.owners[key].key)[:-1], key)
        for key, entry in merged.added.items()
        if len(catalog.path_of(merged.owners[key].key)) > 1
    }
    return replace(
        weights,
        catalog=replace(
            catalog,
            tensors=tensors,
            paths={**catalog.paths, **paths},
            tied={k: v for k, v in catalog.tied.items() if not {k, v} & replaced},
        ),
        entries={key: change(entry) for key, entry in {**weights.entries, **merged.added}.items()},
        tied={
            key: owner
            for key, owner in weights.tied.items()
            if not {stored.get(key), stored.get(owner)} & replaced
        },
    )


def _told(adapters: Sequence[Weighed]) -> Iterator[str]:
    for one in adapters:
        adapter = one.adapter
        weight = f", times {one.weight:g}" if one.weight != 1 else ""
        given = f", {len(adapter.given)} tensors replaced" if adapter.given else ""
        yield (
            f"adapter {adapter.path} ({adapter.kind}): {len(adapter.updates)} matrices changed"
            f"{weight}{given}"
        )
        yield from adapter.notes


def _hint(adapters: Iterable[Weighed], weights: Weights) -> str | None:
    names = {one.adapter.base for one in adapters if one.adapter.base}
    if names:
        return f"the adapter was trained on {', '.join(sorted(names))}; is that this base?"
    if weights.keymap is None:
        return "no table knows the base's keys: its adapter has to spell them alike"
    return None
