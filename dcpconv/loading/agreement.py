"""Before anything moves: every rank looks at its model and at the checkpoint, and all agree.

What the ranks tell each other does not grow with the number of tensors times the number of ranks:
digests, one mark per stored key, and whatever is wrong, once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from dcpconv.core.errors import DcpconvError
from dcpconv.engine.tensors import dtype_of
from dcpconv.formats.collecting import without_garbage_collection
from dcpconv.loading.account import Offer, match, offer_of, offered_as
from dcpconv.loading.buffers import Restored, restore_buffers
from dcpconv.loading.catalogs import Opened, Seen, look, require_alike
from dcpconv.loading.doubles import with_doubles
from dcpconv.loading.entries import entries
from dcpconv.loading.memory import require_fillable
from dcpconv.loading.model import Place, home_of, places, reshard
from dcpconv.loading.regions import Need, needs_of
from dcpconv.loading.shares import place_in, share_out
from dcpconv.loading.supply import supply_of
from dcpconv.loading.terms import Addition, Agreement, LoadRequest, Supplied
from dcpconv.loading.verdict import judge
from dcpconv.loading.world import World
from dcpconv.plan.fills import fill_of
from dcpconv.sources.adapters.naming import Weighed, weighed
from dcpconv.sources.adapters.reading import look_at_adapter, with_whole_paths
from dcpconv.sources.adapters.record import Adapter
from dcpconv.sources.live_models import live_model
from dcpconv.sources.understanding import Source, understand
from dcpconv.stores.remote import RemotePath


@without_garbage_collection()
def agree(
    model: nn.Module,
    request: LoadRequest,
    world: World,
    *,
    add: Callable[[Agreement, Any], Addition] | None = None,
) -> Agreement:
    """Look at model and checkpoint and agree with the other ranks on whether they fit.

    Non-persistent buffers are computed on the way; no parameter and no other buffer is touched.

    Args:
        model: The model.
        request: What the caller wants.
        world: The ranks.
        add: Says what else to load, of the weights' agreement and of what the opener knows.

    Raises:
        CoverageError: They do not fit; the same on every rank.
        DcpconvError: A rank could not tell; what it found is raised on every rank.
    """
    failure: Exception | None = None
    found: tuple[Place, ...] = ()
    restored = Restored()
    agreement: Agreement | None = None
    try:
        found, restored = _look_at_model(model, request)
    except Exception as error:  # noqa: BLE001 - all ranks hear of it below
        failure = error
    seen = _look_at_source(request, world, found)
    adapters = [_look_at_adapter(text, request, world) for text in request.options.adapters]
    failure = failure or next(
        (one for one in (seen, *adapters) if isinstance(one, Exception)), None
    )
    if failure is None and not isinstance(seen, Exception):
        try:
            offer, supplied = _supplied(model, request, found, seen.source, _weighed(adapters))
            agreement = _account(model, request, found, restored, offer, supplied)
            if add is not None:
                agreement = _with_addition(agreement, add(agreement, seen.beside))
        except Exception as error:  # noqa: BLE001 - all ranks hear of it below
            failure = error
    world.agree(failure)
    if agreement is None or isinstance(seen, Exception):
        raise AssertionError("no rank failed, yet this one has nothing to go by")
    require_alike(seen, world)
    for one in adapters:
        if not isinstance(one, Exception):
            require_alike(one, world)
    agreement = with_doubles(agreement, request, world)
    agreement = replace(agreement, unexpected=judge(agreement, request, world))
    if request.by_state_dict:
        return agreement
    shares = share_out(
        agreement.needs,
        world,
        read=None if request.read == "auto" else request.read,
        hosts=seen.hosts,
        is_cached=not isinstance(seen.source.catalog.path, RemotePath),
        nbytes=agreement.nbytes,
        place=place_in(agreement.supplied.targets),
    )
    return replace(agreement, shares=shares)


def _with_addition(agreement: Agreement, addition: Addition) -> Agreement:
    offer, supplied = agreement.offer, agreement.supplied
    offered = {key: offered_as(target) for key, target in addition.targets.items()}
    supplied = replace(supplied, targets={**supplied.targets, **addition.targets})
    for need in addition.needs:
        supplied.require_fillable(need.wish)
    return replace(
        agreement,
        offer=replace(offer, tensors={**offer.tensors, **offered}),
        supplied=supplied,
        needs=(*agreement.needs, *addition.needs),
        addition=addition,
    )


def _look_at_model(model: nn.Module, request: LoadRequest) -> tuple[tuple[Place, ...], Restored]:
    reshard(model)
    found = [place for place in places(model) if place.is_parameter or place.is_persistent]
    require_fillable((one.fqn, one.tensor) for one in found if is_lazy(one.tensor))
    restored = restore_buffers(model, request.device or home_of(model))
    return entries(model, tuple(found)) if request.by_state_dict else tuple(found), restored


def _look_at_source(
    request: LoadRequest, world: World, found: Sequence[Place]
) -> Seen[Source] | Exception:
    def understood(path: Path) -> Opened[Source]:
        parameters = {place.fqns[0]: place.shape for place in found if place.is_parameter}
        return Opened(understand(path, request.options.said(), shapes=parameters or None))

    opener = request.opener or understood
    return look(
        request.source,
        opener,
        world,
        only_first=request.read == "rank0",
        adapters=len(request.options.adapters),
    )


def _look_at_adapter(text: str, request: LoadRequest, world: World) -> Seen[Adapter] | Exception:
    def opened(path: Path) -> Opened[Adapter]:
        _, weight = weighed(text)
        return Opened(look_at_adapter(path), weight)

    name = text
    with suppress(DcpconvError):  # the opener raises it, where all ranks hear of it
        name, _ = weighed(text)
    return look(name, opened, world, only_first=request.read == "rank0")


def _weighed(seen: Sequence[Seen[Adapter] | Exception]) -> tuple[Weighed, ...]:
    """All adapters, with the weights that rank 0 was told."""
    return tuple(
        Weighed(with_whole_paths(one.source), one.beside)
        for one in seen
        if not isinstance(one, Exception)
    )


def _supplied(
    model: nn.Module,
    request: LoadRequest,
    found: Sequence[Place],
    source: Source,
    adapters: Sequence[Weighed],
) -> tuple[Offer, Supplied]:
    wanted = {fqn: place.shape for place in found for fqn in place.fqns}
    supply = supply_of(
        source, request.options, adapters=adapters, wanted=wanted, live=live_model(model)
    )
    for target in supply.coverage.targets:
        nothing = (0,) * len(target.shape)
        if any(piece.entry.factors for piece in target.pieces):
            fill_of(target, nothing, nothing)  # raises here what would leave weights half loaded
    return offer_of(supply, os.fspath(request.source)), Supplied(supply, supply.targets())


def _account(
    model: nn.Module,
    request: LoadRequest,
    found: tuple[Place, ...],
    restored: Restored,
    offer: Offer,
    supplied: Supplied,
) -> Agreement:
    account = match(found, offer, ignore=request.ignore)
    needs: list[Need] = []
    casts: Counter[tuple[str, str]] = Counter()
    if not request.by_state_dict:
        require_fillable((place.fqn, place.tensor) for place, _ in account.chosen)
    for place, key in account.chosen:
        if not request.by_state_dict:
            needs.extend(needs_of(place, key))
        had, now = offer.tensors[key], dtype_of(place.tensor)
        if had.dtype is not now and not request.keeps_dtype:
            _require_renewable(model, place)
            now = had.dtype
        if had.kind != now.label:
            casts[had.kind, now.label] += 1
    for need in needs:
        supplied.require_fillable(need.wish)
    return Agreement(
        places=found,
        restored=restored,
        offer=offer,
        account=account,
        needs=tuple(needs),
        casts=casts,
        unexpected=(),
        supplied=supplied,
    )


def _require_renewable(model: nn.Module, place: Place) -> None:
    """FSDP1 and DDP have laid out buffers for one dtype when they wrapped the model."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            raise DcpconvError(
                "dtype='source' would change parameters that are already wrapped",
                [("wrapper", type(module).__name__), ("fqn", place.fqn)],
                hint="build the model in that dtype, or cast: dtype='model'",
            )
