"""Tensors that are one in the model and two in the checkpoint: only equal ones can be loaded."""

from __future__ import annotations

from dataclasses import replace

from dcpconv.loading.terms import Agreement, LoadRequest
from dcpconv.loading.world import World
from dcpconv.plan.coverage import Fault
from dcpconv.plan.ties import are_equal
from dcpconv.stores.local import Sources


def with_doubles(agreement: Agreement, request: LoadRequest, world: World) -> Agreement:
    """The agreement, with those of its doubles that hold different values.

    Both tensors are read once, by one rank of those that have them as one.  Few checkpoints store a
    tensor twice.

    Raises:
        FormatError: They cannot be read.
    """
    asked = world.distinct(agreement.account.doubles)
    if not asked:
        return agreement
    failure: Exception | None = None
    faults: tuple[Fault, ...] = ()
    readers = {rank: pairs for rank, pairs in asked if request.read != "rank0"}
    if request.read == "rank0":
        readers[0] = tuple(dict.fromkeys(pair for _, pairs in asked for pair in pairs))
    try:
        faults = _differing(agreement, readers.get(world.rank, ()))
    except Exception as error:  # noqa: BLE001 - all ranks hear of it below
        failure = error
    world.agree(failure)
    heard = dict.fromkeys(fault for _, told in world.distinct(faults) for fault in told)
    return replace(agreement, differing=tuple(heard))


def _differing(agreement: Agreement, pairs: tuple[tuple[str, str], ...]) -> tuple[Fault, ...]:
    targets = agreement.supplied.targets
    faults = []
    with Sources.of(agreement.supplied.catalog) as sources:
        for fqn, other in pairs:
            if fqn not in targets or other not in targets:
                continue
            both = zip(targets[fqn].pieces, targets[other].pieces, strict=False)
            if len(targets[fqn].pieces) != len(targets[other].pieces) or not all(
                are_equal(one.entry, two.entry, sources) for one, two in both
            ):
                faults.append(Fault(other, f"differs from {fqn}, with which it is one here"))
    return tuple(faults)
