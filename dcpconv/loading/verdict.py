"""Whether a model and a checkpoint fit, told once for all ranks: every fault, whoever has it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dcpconv.core.errors import CoverageError
from dcpconv.loading.terms import Addition, Agreement, LoadRequest
from dcpconv.loading.world import World
from dcpconv.plan.coverage import Fault


@dataclass(frozen=True, slots=True)
class _Faults:
    """What is wrong on one rank."""

    missing: tuple[Fault, ...] = ()
    misshapen: tuple[Fault, ...] = ()
    scaled: tuple[Fault, ...] = ()
    lost: tuple[Fault, ...] = ()
    garbage: tuple[Fault, ...] = ()
    tied: tuple[Fault, ...] = ()
    optimizer: tuple[Fault, ...] = ()

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


def _faults(agreement: Agreement, request: LoadRequest) -> _Faults:
    account = agreement.account
    lost = [] if request.strict or request.initialises else agreement.missing()
    lost = [place for place in lost if place.is_meta]
    return _Faults(
        account.missing if request.strict else (),
        account.misshapen,
        account.scaled,
        tuple(Fault(place.fqn, "on the meta device; pass init_missing") for place in lost),
        tuple(
            Fault(name, "buffer that is in no checkpoint and that its module does not compute")
            for name in agreement.restored.uninitialised
        )
        if request.strict
        else (),
        agreement.differing if request.strict else (),
        agreement.addition.faults,
    )


def _unexpected(agreement: Agreement, world: World) -> tuple[Fault, ...]:
    """Stored keys that no rank has a place for; with pipeline parallelism ranks hold different
    layers, and each finds those of the others unexpected."""
    supply = agreement.supplied.supply
    stored = sorted(supply.catalog.tensors)
    entries = supply.weights.entries
    faults = {fault.key: fault for fault in agreement.account.unexpected}
    keys = {
        key: entries[key].key if key in entries and key not in supply.catalog.tensors else key
        for key in faults
    }
    wrong = {*keys.values()}
    everywhere = world.in_common(bytearray(key in wrong for key in stored))
    shared = {key for key, is_so in zip(stored, everywhere, strict=True) if is_so}
    return tuple(fault for key, fault in faults.items() if keys[key] in shared)


def judge(agreement: Agreement, request: LoadRequest, world: World) -> tuple[Fault, ...]:
    """Raise what all ranks raise, or return what is unexpected on all of them.

    Only what all have heard may be told: a rank's own path may be another.
    """
    unexpected = _unexpected(agreement, world)
    heard = [faults for _, faults in world.distinct(_faults(agreement, request))]
    rows = {
        "missing": _merged(one.missing for one in heard),
        "unexpected": unexpected if request.strict else (),
        "misshapen": _merged(one.misshapen for one in heard),
        "scaled": _merged(one.scaled for one in heard),
        "garbage": _merged(one.garbage for one in heard),
        "tied": _merged(one.tied for one in heard),
        "lost": _merged(one.lost for one in heard),
        "optimizer": (
            *_merged(one.optimizer for one in heard),
            *_idle(agreement.addition, world, is_fault=request.strict),
        ),
    }
    rows["missing"] += rows.pop("lost")
    counts = [f"{len(faults)} {label}" for label, faults in rows.items() if faults]
    if counts:
        account, offer = agreement.account, agreement.offer
        source, model, loaded, rows["unexpected"] = world.from_first(
            (
                f"{offer.source}  {offer.form}  {offer.family}",
                f"{offer.target}  {len(account.chosen)} tensors match",
                len(account.chosen),
                rows["unexpected"],
            )
        )
        raise CoverageError(
            f"the checkpoint does not fit the model: {', '.join(counts)}; nothing was loaded",
            [
                ("source", source),
                ("model", model),
                *(
                    (label, f"{fault.key}  {fault.why}".rstrip())
                    for label, faults in rows.items()
                    for fault in faults
                ),
            ],
            hint=request.options.advice
            if rows["scaled"]
            else _hint({label for label, faults in rows.items() if faults}, loaded),
        )
    return unexpected


def _idle(addition: Addition, world: World, *, is_fault: bool) -> tuple[Fault, ...]:
    """What is stored beside the weights and no rank has a place for."""
    marks = world.in_common(bytearray(name in addition.idle for name in addition.names))
    return tuple(
        Fault(name, "is stored, and no rank's optimizer has it")
        for name, is_idle in zip(addition.names, marks, strict=True)
        if is_idle and is_fault
    )


def _merged(faults: Iterable[tuple[Fault, ...]]) -> tuple[Fault, ...]:
    """Every fault once, by rank."""
    return tuple({fault.key: fault for some in faults for fault in some}.values())


def _hint(labels: set[str], loaded: int) -> str | None:
    if not loaded:
        return "is this a checkpoint of the same model? to=NAME says how the model spells its keys"
    if "misshapen" in labels:
        return "is this a checkpoint of the same size of model?"
    if labels == {"optimizer"}:
        return "build the optimizer as the run's was; strict=False starts the rest without state"
    if labels == {"tied"}:
        return "build the model untied (tie_word_embeddings=False); strict=False loads the first"
    if labels == {"garbage"}:
        return "give the module a reset_parameters() that computes them"
    return "strict=False loads the rest, ignore=PATTERN passes single keys over"
