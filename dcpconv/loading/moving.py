"""After the agreement: give the model memory, fill it, and agree on how that went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from dcpconv.core.errors import SourceChangedError
from dcpconv.loading.agreement import Agreement, LoadRequest
from dcpconv.loading.exchange import Exchange, share_out
from dcpconv.loading.materialise import materialise
from dcpconv.loading.reading import Landing, read_landings, torch_dtype
from dcpconv.loading.regions import Need, Wish
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
) -> Arrived:
    """Carry out an agreement.

    Raises:
        FormatError: A file could not be read, on this rank or another; the same on every rank.
            Weights are undefined then.
    """
    failure: BaseException | None = None
    try:
        _materialise(model, agreement, request)
    except Exception as error:  # noqa: BLE001 - all ranks hear of it below
        failure = error
    if agreement.read != "all":
        world.agree(failure)
    arrived = Arrived(failure=failure)
    if failure is None:
        tell = teller(agreement, progress)
        try:
            if agreement.read == "all":
                arrived = _read(agreement, jobs, tell)
            else:
                arrived = _exchange(agreement, world, tell)
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
    materialise(model, wanted, device=request.device, dtypes=dtypes)


def _read(agreement: Agreement, jobs: int | None, tell: Callable[[int], None]) -> Arrived:
    supplied = agreement.supplied
    landings = [
        Landing(need.place.fqn, supplied.fill(need.wish), need.wish.start, need.into)
        for need in agreement.needs
    ]
    with Sources(supplied.directory, identities=supplied.identities) as sources:
        losses = read_landings(landings, sources=sources, jobs=jobs, progress=tell)
        sources.require_unchanged()
    return Arrived(sum(landing.nbytes for landing in landings), 0, losses)


def _exchange(agreement: Agreement, world: World, tell: Callable[[int], None]) -> Arrived:
    wishes = world.gather([need.wish for need in agreement.needs])
    reader = 0 if agreement.read == "rank0" else None
    transfers = share_out(wishes, agreement.nbytes, reader=reader)
    needs: dict[Wish, list[Need]] = {}
    for need in agreement.needs:
        needs.setdefault(need.wish, []).append(need)
    supplied = agreement.supplied
    with Sources(supplied.directory, identities=supplied.identities) as sources:
        exchange = Exchange(
            world=world,
            fill_of=agreement.supplied.fill,
            dtype_of_key=agreement.dtype_of_key,
            sources=sources,
            device=_travel_device(world),
            progress=tell,
        )
        exchange.run(transfers, needs)
        failure = exchange.failure
        if failure is None:
            try:
                sources.require_unchanged()
            except SourceChangedError as error:
                failure = error
    return Arrived(exchange.read, exchange.received, exchange.losses, failure)


def _travel_device(world: World) -> torch.device:
    """Where a tensor must be for the process group to send it."""
    if world.size == 1:
        return torch.device("cpu")
    backend = str(torch.distributed.get_backend(world.group))
    if "nccl" in backend and "gloo" not in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
