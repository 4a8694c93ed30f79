"""From what was agreed and what arrived to a report."""

from __future__ import annotations

from dcpconv.engine.execute import LossyCast
from dcpconv.loading.moving import Arrived
from dcpconv.loading.report import LoadReport
from dcpconv.loading.terms import Agreement


def report_of(agreement: Agreement, arrived: Arrived, initialised: tuple[str, ...]) -> LoadReport:
    """What loading did on this rank, but for how long it took."""
    offer, account = agreement.offer, agreement.account
    left = f"{offer.left} entries beside the weights stay behind"
    return LoadReport(
        source=offer.source,
        form=offer.form,
        family=offer.family,
        target=offer.target,
        loaded=tuple(place.fqn for place, _ in account.chosen),
        nbytes=sum(agreement.nbytes(need.wish) for need in agreement.needs),
        nbytes_read=arrived.read,
        nbytes_received=arrived.received,
        missing=tuple((fault.key, fault.why) for fault in account.missing),
        unexpected=tuple((fault.key, fault.why) for fault in agreement.unexpected),
        ignored=tuple((fault.key, fault.why) for fault in account.ignored),
        tied=tuple(place.fqns for place in agreement.places if len(place.fqns) > 1),
        casts=tuple((old, new, count) for (old, new), count in agreement.casts.items()),
        lossy=tuple(LossyCast(key, *lost) for key, lost in sorted(arrived.losses.items())),
        computed_buffers=agreement.restored.computed,
        uninitialised_buffers=agreement.restored.uninitialised,
        initialised=initialised,
        on_meta=(),
        engine="direct",
        read=agreement.shares.read,
        notes=(
            *offer.notes,
            *(f"{fault.key} {fault.why}, and is not loaded" for fault in agreement.differing),
            *((left,) if offer.left else ()),
            *((agreement.shares.note,) if agreement.shares.note else ()),
        ),
        seconds=0.0,
    )
