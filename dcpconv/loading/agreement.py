"""Before anything moves: every rank looks at its model and at the checkpoint, and all agree.

What the ranks tell each other does not grow with the number of tensors times the number of ranks:
digests, one mark per stored key, and whatever is wrong, once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from dcpconv.core.catalog import Catalog
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import CoverageError, DcpconvError
from dcpconv.core.outline import Fill
from dcpconv.loading.account import Account, Offer, match, offer_of
from dcpconv.loading.buffers import Restored, restore_buffers
from dcpconv.loading.catalogs import Seen, look, require_alike
from dcpconv.loading.entries import entries
from dcpconv.loading.model import Place, device_of, places, reshard
from dcpconv.loading.reading import dtype_of
from dcpconv.loading.regions import Need, Wish, needs_of
from dcpconv.loading.shares import Shares, place_in, share_out
from dcpconv.loading.supply import Options, Supply, supply_of
from dcpconv.loading.world import World
from dcpconv.plan.coverage import Fault, Target
from dcpconv.plan.fills import fill_of
from dcpconv.sources.live_models import live_model
from dcpconv.sources.understanding import Source

ReadMode = Literal["auto", "all", "host", "once", "rank0"]
LoadEngine = Literal["auto", "direct", "torch"]


@dataclass(frozen=True)
class LoadRequest:
    """What the caller wants.

    Attributes:
        source: The checkpoint.
        options: How to understand it.
        strict: Whether what is missing, unexpected or uninitialised is an error.
        keeps_dtype: Whether parameters keep their dtype.
        ignore: Shell patterns of names to pass over.
        initialises: Whether the caller fills what is missing.
        read: Which ranks read.
        device: Where tensors on the meta device go that are no DTensors.
        by_state_dict: Whether the tensors to fill are those of the model's state dict.
    """

    source: str | os.PathLike[str]
    options: Options
    strict: bool
    keeps_dtype: bool
    ignore: tuple[str, ...]
    initialises: bool
    read: ReadMode
    device: torch.device | None
    by_state_dict: bool = False


@dataclass(frozen=True)
class Supplied:
    """Where the bytes are.

    Attributes:
        supply: What was made of the source.
        targets: Every tensor by FQN.
    """

    supply: Supply
    targets: Mapping[str, Target]

    @property
    def catalog(self) -> Catalog:
        """The source, under the path that it has on this host."""
        return self.supply.catalog

    def fill(self, wish: Wish) -> Fill:
        """How a wish is read.

        Raises:
            FormatError: The stored chunks do not cover it.
        """
        return fill_of(self.targets[wish.key], wish.offsets, wish.sizes)

    def require_fillable(self, wish: Wish) -> None:
        """Raises where ``fill`` would, and makes nothing where a tensor is stored as it is."""
        target = self.targets[wish.key]
        pieces = target.pieces
        is_plain = len(pieces) == 1 and pieces[0].placed is None and pieces[0].wanted is None
        if is_plain and len(pieces[0].entry.chunks) == 1 and not pieces[0].entry.factors:
            chunk = pieces[0].entry.chunks[0]
            if chunk.sizes == target.shape and not pieces[0].limit:
                return
        self.fill(wish)


@dataclass(frozen=True)
class Agreement:
    """What this rank will do, all ranks agreeing.

    Attributes:
        places: Parameters and persistent buffers of the model.
        restored: What became of the other buffers.
        offer: What the checkpoint has.
        account: How both fit.
        needs: Every region that this rank holds.
        casts: Tensors by ``(how the source stores them, model dtype)``, where these differ.
        unexpected: Stored keys that no rank has a place for.
        supplied: Where the bytes are.
        shares: Who reads what.
    """

    places: tuple[Place, ...]
    restored: Restored
    offer: Offer
    account: Account
    needs: tuple[Need, ...]
    casts: Counter[tuple[str, str]]
    unexpected: tuple[Fault, ...]
    supplied: Supplied
    shares: Shares = field(default_factory=Shares)

    def dtype_of_key(self, key: str) -> DType:
        """Dtype of a tensor as it is read from the source."""
        return self.offer.tensors[key].dtype

    def itemsize(self, wish: Wish) -> int:
        """Bytes of an element of a wish, as it is read from the source."""
        return self.dtype_of_key(wish.key).itemsize

    def nbytes(self, wish: Wish) -> int:
        """Bytes of a wish, as they are read from the source."""
        return (wish.stop - wish.start) * self.itemsize(wish)

    def missing(self) -> list[Place]:
        """What the checkpoint cannot supply."""
        lost = {fault.key for fault in self.account.missing}
        return [place for place in self.places if place.fqn in lost]


@dataclass(frozen=True, slots=True)
class _Faults:
    """What is wrong on one rank."""

    missing: tuple[Fault, ...] = ()
    misshapen: tuple[Fault, ...] = ()
    scaled: tuple[Fault, ...] = ()
    lost: tuple[Fault, ...] = ()
    garbage: tuple[Fault, ...] = ()

    def __bool__(self) -> bool:
        return any((self.missing, self.misshapen, self.scaled, self.lost, self.garbage))


def agree(model: nn.Module, request: LoadRequest, world: World) -> Agreement:
    """Look at model and checkpoint and agree with the other ranks on whether they fit.

    Non-persistent buffers are computed on the way; no parameter and no other buffer is touched.

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
    seen = _look_at_source(request, world)
    if isinstance(seen, Exception):
        failure = failure or seen
    elif failure is None:
        try:
            offer, supplied = _supplied(model, request, found, seen.source)
            agreement = _account(model, request, found, restored, offer, supplied)
        except Exception as error:  # noqa: BLE001 - all ranks hear of it below
            failure = error
    world.agree(failure)
    if agreement is None or isinstance(seen, Exception):
        raise AssertionError("no rank failed, yet this one has nothing to go by")
    require_alike(seen, world)
    unexpected = _judge(agreement, request, world)
    agreement = replace(agreement, unexpected=unexpected)
    if request.by_state_dict:
        return agreement
    shares = share_out(
        agreement.needs,
        world,
        read=None if request.read == "auto" else request.read,
        hosts=seen.hosts,
        nbytes=agreement.nbytes,
        place=place_in(agreement.supplied.targets),
    )
    return replace(agreement, shares=shares)


def _look_at_model(model: nn.Module, request: LoadRequest) -> tuple[tuple[Place, ...], Restored]:
    reshard(model)
    found = [place for place in places(model) if place.is_parameter or place.is_persistent]
    fallback = next((device_of(p, request.device) for p in found if p.is_parameter), None)
    device = request.device or fallback or torch.device("cpu")
    restored = restore_buffers(model, device)
    return entries(model, tuple(found)) if request.by_state_dict else tuple(found), restored


def _look_at_source(request: LoadRequest, world: World) -> Seen | Exception:
    return look(request.source, request.options, world, only_first=request.read == "rank0")


def _supplied(
    model: nn.Module, request: LoadRequest, found: Sequence[Place], source: Source
) -> tuple[Offer, Supplied]:
    wanted = {fqn: place.shape for place in found for fqn in place.fqns}
    supply = supply_of(source, request.options, wanted=wanted, live=live_model(model))
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


def _judge(agreement: Agreement, request: LoadRequest, world: World) -> tuple[Fault, ...]:
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
        "lost": _merged(one.lost for one in heard),
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


def _merged(faults: Iterable[tuple[Fault, ...]]) -> tuple[Fault, ...]:
    """Every fault once, by rank."""
    return tuple({fault.key: fault for some in faults for fault in some}.values())


def _hint(labels: set[str], loaded: int) -> str | None:
    if not loaded:
        return "is this a checkpoint of the same model? to=NAME says how the model spells its keys"
    if "misshapen" in labels:
        return "is this a checkpoint of the same size of model?"
    if labels == {"garbage"}:
        return "give the module a reset_parameters() that computes them"
    return "strict=False loads the rest, ignore=PATTERN passes single keys over"
