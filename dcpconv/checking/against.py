"""Are these the keys and shapes that something else has?  The account against a given list.

The source may be in another naming than the list; what its keys then become is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap
from dcpconv.plan.coverage import Coverage, Fault, Piece, Target
from dcpconv.sources.parameter_shapes import expected
from dcpconv.sources.recognition import Weights

_ENOUGH = 0.5
"""Share of keys in common from which two checkpoints are compared key by key."""


def share_keys(source: Weights, wanted: Weights) -> bool:
    """Whether both sides spell their keys alike, most of them at least."""
    common = source.entries.keys() & wanted.entries.keys()
    return len(common) > _ENOUGH * min(len(source.entries), len(wanted.entries))


def compare_keys(source: Weights, wanted: Weights, *, is_tied: bool) -> Coverage:
    """The account of two sides that spell their keys alike.

    Args:
        source: What is there.
        wanted: What there should be.
        is_tied: Whether embedding and head are one tensor, as far as a config says.
    """
    table = source.keymap or wanted.keymap
    owners = _owners(source, wanted, table, is_tied=is_tied)
    seconds = {owner: key for key, owner in owners.items() if key in source.entries}
    targets, missing, misshapen = [], [], []
    ignored: list[Fault] = []
    for key, entry in wanted.entries.items():
        slots, reason = _told(table, key)
        name = key
        if name not in source.entries:
            twins = (owners.get(key, ""), seconds.get(key, ""))
            name = next((twin for twin in twins if twin in source.entries), key)
        found = source.entries.get(name)
        if found is None:
            if reason:
                ignored.append(Fault(key, reason))
            else:
                missing.append(Fault(key, "not in the source", slots))
            continue
        if found.shape != entry.shape:
            misshapen.append(Fault.unlike(key, list(entry.shape), list(found.shape), slots))
        second = name if name != key else None
        if second is None and owners.get(key) in wanted.entries:
            second = owners[key]
        targets.append(Target(key, found.shape, found.dtype, (Piece(found),), second, slots=slots))
    extra = [key for key in source.entries if key not in wanted.entries]
    unknown, tied, dropped = _extra(extra, table, owners)
    return Coverage(
        source.keymap.name if source.keymap else "as stored",
        wanted.keymap.name if wanted.keymap else "as stored",
        tuple(targets),
        missing=tuple(missing),
        unknown=unknown,
        misshapen=tuple(misshapen),
        ignored=(*ignored, *dropped),
        tied=tied,
        left=source.rest,
        is_tied=bool(owners),
    )


def compare_results(coverage: Coverage, source: Weights, wanted: Weights) -> Coverage:
    """The account of a conversion whose result should have exactly the keys of ``wanted``."""
    made = {target.key: target for target in coverage.targets}
    why = {fault.key: fault for fault in coverage.missing}
    wrong = {e.key for f in coverage.misshapen if (e := source.entries.get(f.key))}
    missing, misshapen = [], list(coverage.misshapen)
    for key, entry in wanted.entries.items():
        target = made.get(key)
        slots, reason = _told(wanted.keymap, key)
        if target is None:
            owner = wanted.tied.get(key)
            if not reason and owner not in made:
                missing.append(why.get(key, Fault(key, "nothing in the source makes it", slots)))
        elif target.shape != entry.shape and not any(p.entry.key in wrong for p in target.pieces):
            misshapen.append(Fault.unlike(key, list(entry.shape), list(target.shape), slots))
    unknown = list(coverage.unknown)
    for key, target in made.items():
        if key not in wanted.entries and target.tied_to is None:
            unknown.extend(
                Fault(name, f"the target has no {key}", target.slots)
                for name in dict.fromkeys(piece.entry.key for piece in target.pieces)
            )
    return replace(
        coverage,
        targets=tuple(target for key, target in made.items() if key in wanted.entries),
        missing=tuple(missing),
        misshapen=tuple(misshapen),
        unknown=tuple(unknown),
    )


def nothing_known(source: Weights, wanted: Keymap, spec: ModelSpec | None) -> Coverage:
    """The account of a source whose naming no table knows: nothing can be made of it."""
    present = source.entries
    return Coverage(
        "as stored",
        wanted.name,
        (),
        missing=tuple(
            Fault(key, "the source's naming is not known", slots)
            for key, _, slots in (expected(wanted, spec) if spec else ())
        ),
        unknown=tuple(Fault(key, "no naming table knows it") for key in present),
        left=source.rest,
    )


def dtype_faults(
    pairs: Iterable[tuple[str, TensorEntry | Target, TensorEntry]],
) -> Iterator[Fault]:
    """Keys whose element type is not that of the other side."""
    for key, found, wanted in pairs:
        if found.dtype != wanted.dtype:
            yield Fault.unlike(key, wanted.dtype, found.dtype)


def _owners(
    source: Weights, wanted: Weights, table: Keymap | None, *, is_tied: bool
) -> Mapping[str, str]:
    """Second name -> owner, from shared storage on either side and from the table."""
    owners = dict(source.tied) | dict(wanted.tied)
    if table is not None and is_tied:
        owners = table.tie_pairs() | owners
    return owners


def _told(table: Keymap | None, key: str) -> tuple[tuple[str, ...], str]:
    """Slots of a key, and why it is ignored, as a table says."""
    match = table.match(key) if table is not None else None
    if match is None:
        return (), ""
    reason = match.reason if match.kind == "ignored" else ""
    return (match.row.slots if match.row else ()), reason


def _extra(
    keys: Iterable[str], table: Keymap | None, owners: Mapping[str, str]
) -> tuple[tuple[Fault, ...], tuple[tuple[str, str], ...], tuple[Fault, ...]]:
    """Source keys that the target does not have: unknown, second names, ignored."""
    unknown, tied, ignored = [], [], []
    back = {owner: key for key, owner in owners.items()}
    for key in keys:
        slots, reason = _told(table, key)
        owner = owners.get(key) or back.get(key)
        if owner is not None:
            tied.append((key, owner))
        elif reason:
            ignored.append(Fault(key, reason))
        else:
            unknown.append(Fault(key, "the target has no such key", slots))
    return tuple(unknown), tuple(tied), tuple(ignored)
