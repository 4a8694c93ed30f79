"""What a model wants against what a checkpoint offers: every tensor on both sides accounted for."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dcpconv.core.dtypes import DType
from dcpconv.engine.tensors import dtype_of
from dcpconv.loading.model import Place
from dcpconv.loading.supply import Supply
from dcpconv.plan.block_scales import FACTORS
from dcpconv.plan.coverage import Fault, Target


@dataclass(frozen=True, slots=True)
class OfferedTensor:
    """A tensor that can be had, without where its bytes are.

    Attributes:
        shape: Its shape, in elements.
        dtype: As it is read: the source's own, or fp32 where it is multiplied out.
        kind: How the source stores its elements: ``bf16``, ``f8e4m3 in scaled blocks``.
        sources: Stored keys that it is made of.
        factors: Stored keys of factors without which its elements mean nothing.
        tied_to: The key it repeats.
        part: What it is of, where the table names such a part of the model.
    """

    shape: tuple[int, ...]
    dtype: DType
    kind: str
    sources: tuple[str, ...]
    factors: tuple[str, ...]
    tied_to: str | None
    part: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a checkpoint has for a model.

    Attributes:
        source: What the user named.
        form: How its bytes are stored.
        family: Naming of the source.
        target: Naming of the model.
        tensors: By FQN.
        missing: FQNs that the naming has and the source cannot supply, with the reason.
        unknown: Source keys that no rule covers.
        misshapen: Keys whose shape or dtype contradicts the config or another tensor.
        ignored: Source keys that are dropped, with the reason.
        left: Entries beside the weights.
        notes: What a user should know.
    """

    source: str
    form: str
    family: str
    target: str
    tensors: dict[str, OfferedTensor]
    missing: tuple[Fault, ...]
    unknown: tuple[Fault, ...]
    misshapen: tuple[Fault, ...]
    ignored: tuple[Fault, ...]
    left: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """How a model on this rank and an offer fit.

    Attributes:
        chosen: ``(place, FQN it is loaded under)``.
        missing: FQNs that nothing supplies, with the reason.
        unexpected: Stored keys that nothing in this rank's model wants, with the reason.
        misshapen: FQNs and keys whose shape differs from what is stored.
        ignored: Names on either side that the caller said to pass over, or the table drops.
        scaled: FQNs that would get elements of another dtype than the model's without the factors
            that belong to them.
        doubles: ``(FQN that is loaded, other FQN)`` of tensors that are one in the model and two in
            the source.
    """

    chosen: tuple[tuple[Place, str], ...]
    missing: tuple[Fault, ...]
    unexpected: tuple[Fault, ...]
    misshapen: tuple[Fault, ...]
    ignored: tuple[Fault, ...]
    scaled: tuple[Fault, ...]
    doubles: tuple[tuple[str, str], ...] = ()


def offer_of(supply: Supply, source: str) -> Offer:
    """What can be said about a supply without its bytes."""
    coverage = supply.coverage
    root = supply.root
    return Offer(
        source=source,
        form=supply.catalog.form,
        family=coverage.source,
        target=coverage.target,
        tensors={
            key: offered_as(
                target,
                factors=supply.factors_of(target),
                tied_to=root + target.tied_to if target.tied_to else None,
            )
            for key, target in supply.targets().items()
        },
        missing=tuple(replace(fault, key=root + fault.key, slots=()) for fault in coverage.missing),
        unknown=coverage.unknown,
        misshapen=coverage.misshapen,
        ignored=coverage.ignored,
        left=len(coverage.left),
        notes=supply.notes,
    )


def offered_as(
    target: Target, *, factors: tuple[str, ...] = (), tied_to: str | None = None
) -> OfferedTensor:
    """A tensor without where its bytes are."""
    return OfferedTensor(
        target.shape,
        target.dtype,
        target.pieces[0].kind if target.pieces else target.dtype.label,
        tuple(dict.fromkeys(piece.entry.key for piece in target.pieces)),
        factors,
        tied_to,
        target.part,
    )


def match(wanted: Sequence[Place], offer: Offer, *, ignore: Sequence[str] = ()) -> Account:
    """Account for every tensor of a model and of an offer.

    Args:
        wanted: Parameters and persistent buffers of the model.
        offer: What the checkpoint has.
        ignore: Shell patterns of FQNs to leave alone, and of stored keys to pass over.
    """
    chosen: list[tuple[Place, str]] = []
    missing: list[Fault] = []
    misshapen = list(offer.misshapen)
    scaled: list[Fault] = []
    doubles: list[tuple[str, str]] = []
    ignored = list(offer.ignored)
    faults = {fault.key: fault for fault in offer.missing}
    used: set[str] = set()
    names = {fqn for place in wanted for fqn in place.fqns}
    for place in wanted:
        if _is_ignored(place.fqns, ignore):
            ignored.append(Fault(place.fqn, "left as it is: the caller said so"))
            used.update(
                key
                for fqn in place.fqns
                if fqn in offer.tensors
                for key in offer.tensors[fqn].sources
            )
            continue
        had = [fqn for fqn in place.fqns if fqn in offer.tensors]
        if not had:
            fault = next((faults[fqn] for fqn in place.fqns if fqn in faults), None)
            is_plain = fault is None or fault.kind == "absent"
            missing.append(Fault(place.fqn, "" if is_plain or fault is None else fault.why))
            continue
        # The owner first: a second name may have been stored before they were tied.
        fqn = min(had, key=lambda name: offer.tensors[name].tied_to is not None)
        used.update(key for name in had for key in offer.tensors[name].sources)
        one = offer.tensors[fqn]
        if one.shape != place.shape:
            shapes = f"{list(place.shape)} in the model, {list(one.shape)} in the source"
            misshapen.append(Fault(place.fqn, shapes))
        elif (
            one.factors
            and one.dtype is not dtype_of(place.tensor)
            and not any(name + suffix in names for name in had for suffix in FACTORS)
        ):
            scaled.append(Fault(place.fqn, f"needs {', '.join(one.factors)}"))
            used.update(one.factors)
        else:
            chosen.append((place, fqn))
            doubles.extend(
                (fqn, name) for name in had if offer.tensors[name].sources != one.sources
            )
    unexpected: dict[str, str] = {}
    for fault in offer.unknown:
        if fault.key not in used:
            unexpected[fault.key] = fault.why
    parts = {one.part for fqn, one in offer.tensors.items() if fqn in names}
    for fqn, one in offer.tensors.items():
        if one.part and one.part not in parts:
            ignored.extend(Fault(key, one.part) for key in one.sources)
            continue
        if fqn in names or (one.tied_to is not None and one.tied_to in names):
            continue
        for key in one.sources:
            if key not in used:
                unexpected[key] = "" if key == fqn else f"would be {fqn}"
    for key in [key for key in unexpected if _is_ignored((key,), ignore)]:
        del unexpected[key]
        ignored.append(Fault(key, "passed over: the caller said so"))
    return Account(
        tuple(chosen),
        tuple(missing),
        tuple(Fault(key, why) for key, why in unexpected.items()),
        tuple(misshapen),
        tuple(ignored),
        tuple(scaled),
        tuple(doubles),
    )


def _is_ignored(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
