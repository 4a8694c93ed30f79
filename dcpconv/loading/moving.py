"""After the agreement: give the model memory, fill it, and agree on how that went.

What no other rank holds is read into the parameters at once, by threads, whatever else is asked
for; what several hold goes through ``Exchange`` meanwhile, unless all of them are to read it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from dcpconv.core.errors import SourceChangedError
from dcpconv.engine.tensors import torch_dtype
from dcpconv.loading.exchange import Exchange
from dcpconv.loading.groups import sends_from
from dcpconv.loading.materialise import materialise
from dcpconv.loading.reading import Landing, read_landings
from dcpconv.loading.regions import Need, Wish
from dcpconv.loading.replicas import TILE, tiles_of
from dcpconv.loading.terms import Agreement, LoadRequest
from dcpconv.loading.world import LostRankError, World, portable
from dcpconv.stores.local import Sources


@dataclass(frozen=True)
class Arrived:
    """What came to this rank.

    Attributes:
        read: Bytes that it read from files.
        received: Bytes that other ranks sent.
        losses: ``(overflowed, underflowed)`` values by FQN, for casts that lost some.
        failure: What went wrong although the process group still works.
    """

    read: int = 0
    received: int = 0
    losses: dict[str, tuple[int, int]] = field(default_factory=dict)
    failure: BaseException | None = None


def move(
    model: nn.Module,
    agreement: Agreement,
    request: LoadRequest,
    world: World,
    *,
    jobs: int | None,
    progress: Callable[[int, int], None] | None,
    prepare: Callable[[], None] | None = None,
) -> Arrived:
    """Carry out an agreement.

    Args:
        model: The model.
        agreement: What to load.
        request: What the caller wants.
        world: The ranks.
        jobs: Threads.
        progress: Called with ``(bytes done, bytes in all)``.
        prepare: Makes memory for what is loaded beside the weights, once they have theirs.

    Raises:
        FormatError: A file could not be read, on this rank or another; the same on every rank.
            Weights are undefined then.
    """
    failure: BaseException | None = None
    try:
        _materialise(model, agreement, request)
        if prepare is not None:
            prepare()
    except Exception as error:  # noqa: BLE001 - all ranks hear of it below
        failure = error
    if agreement.shares.read != "all":
        world.agree(failure)  # nobody may wait for the tiles of a rank that has no memory
    arrived = Arrived(failure=failure)
    if failure is None:
        tell = teller(agreement, progress)
        try:
            if agreement.shares.sent:
                arrived = _exchange(agreement, world, jobs, tell)
            else:
                arrived = _read(agreement, agreement.shares.own, jobs, tell)
        except LostRankError:
            raise
        except Exception as error:  # noqa: BLE001 - all ranks hear of it below
            arrived = Arrived(failure=error)
    agree_on_end(world, arrived.failure)
    return arrived


def agree_on_end(world: World, failure: BaseException | None) -> None:
    """Return if all ranks have what they wanted, else raise the same error on all of them."""
    told = portable(failure)
    if told is not None:
        facts = [*told.facts, ("model", "its weights are undefined now")]
        told = told.with_facts(facts)
    world.agree(told)


def teller(
    agreement: Agreement, progress: Callable[[int, int], None] | None
) -> Callable[[int], None]:
    """Counts bytes for the caller; approximate by a tile where threads meet."""
    if progress is None:
        return lambda _nbytes: None
    total = sum(agreement.nbytes(need.wish) for need in agreement.needs)
    tell, done = progress, 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(done, total)

    return advance


def _materialise(model: nn.Module, agreement: Agreement, request: LoadRequest) -> None:
    chosen = agreement.account.chosen
    wanted = [place for place, _ in chosen]
    if request.initialises:
        wanted += agreement.missing()
    dtypes = {
        place.fqn: torch_dtype(agreement.dtype_of_key(key))
        for place, key in chosen
        if not request.keeps_dtype
    }
    materialise(model, wanted, device=request.device, dtypes=dtypes, huge_pages=request.huge_pages)


def _read(
    agreement: Agreement,
    needs: Sequence[Need],
    jobs: int | None,
    tell: Callable[[int], None],
    stop: threading.Event | None = None,
) -> Arrived:
    supplied = agreement.supplied
    landings = [
        Landing(need.place.fqn, supplied.fill(need.wish), need.wish.start, need.into)
        for need in needs
    ]
    with Sources.of(supplied.catalog) as sources:
        losses = read_landings(landings, sources=sources, jobs=jobs, progress=tell, stop=stop)
        sources.require_unchanged()
    return Arrived(sum(landing.nbytes for landing in landings), 0, losses)


def _exchange(
    agreement: Agreement, world: World, jobs: int | None, tell: Callable[[int], None]
) -> Arrived:
    """What others hold as well, and what they do not at the same time."""
    own: list[Arrived] = []
    stop = threading.Event()

    def read() -> None:
        try:
            own.append(_read(agreement, agreement.shares.own, jobs, tell, stop))
        except Exception as error:  # noqa: BLE001 - all ranks hear of it
            own.append(Arrived(failure=error))

    beside = threading.Thread(target=read, name="read-own")
    if agreement.shares.own:
        beside.start()
    try:
        shared = _send(agreement, world, jobs, tell)
    except BaseException:
        stop.set()
        raise
    finally:
        if beside.ident is not None:
            beside.join()
    for found in own:
        shared = replace(
            shared,
            read=shared.read + found.read,
            losses={**shared.losses, **found.losses},
            failure=shared.failure or found.failure,
        )
    return shared


def _send(
    agreement: Agreement, world: World, jobs: int | None, tell: Callable[[int], None]
) -> Arrived:
    needs: dict[Wish, list[Need]] = {}
    for need in agreement.needs:
        needs.setdefault(need.wish, []).append(need)
    supplied = agreement.supplied
    with Sources.of(supplied.catalog) as sources:
        exchange = Exchange(
            world=world,
            fill_of=supplied.fill,
            dtype_of_key=agreement.dtype_of_key,
            sources=sources,
            device=_travel_device(world),
            progress=tell,
            tile=TILE,
            jobs=jobs or min(4, os.cpu_count() or 1),
        )
        for share in agreement.shares.sent:
            wishes = share.wishes
            if share.is_told:
                wishes = world.tell(wishes, next(filter(None, share.ranks)), 0)
            tiles = tuple(tiles_of(wishes, agreement.itemsize, nbytes=TILE))
            exchange.run(tiles, share.ranks, share.readers, needs)
        failure = exchange.failure
        if failure is None:
            try:
                sources.require_unchanged()
            except SourceChangedError as error:
                failure = error
    return Arrived(exchange.read, exchange.received, exchange.losses, failure)


def _travel_device(world: World) -> torch.device:
    """Where a tensor must be for the process group to send it."""
    if sends_from(world.group, "cpu"):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
