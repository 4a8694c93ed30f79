"""Before anything moves: every rank looks at its model and at the checkpoint, and all agree."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from dcpconv.core.catalog import Identity
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import CoverageError, DcpconvError, FormatError
from dcpconv.core.outline import Fill
from dcpconv.loading.account import Account, Offer, match, offer_of
from dcpconv.loading.buffers import Restored, restore_buffers
from dcpconv.loading.entries import entries
from dcpconv.loading.model import Place, device_of, places, reshard
from dcpconv.loading.reading import dtype_of
from dcpconv.loading.regions import Need, Wish, needs_of
from dcpconv.loading.supply import Options, Supply, prepare
from dcpconv.loading.world import World, hostname, portable, raise_first
from dcpconv.plan.coverage import Fault, Target
from dcpconv.plan.fills import fill_of
from dcpconv.sources.live_models import live_model
from dcpconv.stores.hub import locate

ReadMode = Literal["auto", "all", "once", "rank0"]
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
    """Where the bytes are, on ranks that read.

    Attributes:
        supply: What was made of the source.
        directory: What parts' files are relative to.
        targets: Every tensor by FQN.
        fills: Fills made so far.
        identities: What the files were when their headers were read.
    """

    supply: Supply | None = None
    directory: Path = field(default_factory=Path)
    targets: Mapping[str, Target] = field(default_factory=dict)
    fills: dict[Wish, Fill] = field(default_factory=dict)
    identities: Mapping[str, Identity] = field(default_factory=dict)

    def fill(self, wish: Wish) -> Fill:
        """How a wish is read.

        Raises:
            FormatError: The stored chunks do not cover it.
        """
        if wish not in self.fills:
            self.fills[wish] = fill_of(self.targets[wish.key], wish.offsets, wish.sizes)
        return self.fills[wish]


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
        read: Which ranks read: ``all``, ``once`` or ``rank0``.
    """

    places: tuple[Place, ...]
    restored: Restored
    offer: Offer
    account: Account
    needs: tuple[Need, ...]
    casts: Counter[tuple[str, str]]
    unexpected: tuple[Fault, ...]
    supplied: Supplied
    read: ReadMode

    def dtype_of_key(self, key: str) -> DType:
        """Dtype of a tensor as it is read from the source."""
        return self.offer.tensors[key].dtype

    def nbytes(self, wish: Wish) -> int:
        """Bytes of a wish, as they are read from the source."""
        return (wish.stop - wish.start) * self.dtype_of_key(wish.key).itemsize

    def missing(self) -> list[Place]:
        """What the checkpoint cannot supply."""
        lost = {fault.key for fault in self.account.missing}
        return [place for place in self.places if place.fqn in lost]


@dataclass(frozen=True)
class _Heard:
    """What one rank tells the others."""

    failure: DcpconvError | None
    source: str = ""
    model: str = ""
    host: str = ""
    digest: str = ""
    loaded: int = 0
    missing: tuple[Fault, ...] = ()
    unexpected: tuple[Fault, ...] = ()
    misshapen: tuple[Fault, ...] = ()
    scaled: tuple[Fault, ...] = ()
    lost: tuple[Fault, ...] = ()
    garbage: tuple[Fault, ...] = ()


def unlike(source: str, heard: Sequence[tuple[str, Offer]]) -> FormatError:
    """The error for ranks that see different checkpoints: which rank, which host, which file."""
    first_host, first = heard[0]
    right = {file.file: file for file in first.files}
    facts: list[tuple[str, object]] = [
        ("source", source),
        ("rank 0", f"{first_host} {first.digest}"),
    ]
    others = [rank for rank, (_, offer) in enumerate(heard) if offer.digest != first.digest]
    for rank in others[:8]:
        host, offer = heard[rank]
        found = {file.file: file for file in offer.files}
        facts.append((f"rank {rank}", f"{host} {offer.digest}"))
        for name in dict.fromkeys([*right, *found]):
            old, new = right.get(name), found.get(name)
            if old == new:
                continue
            if old is None or new is None:
                facts.append(("file", f"{name}: only on rank {0 if new is None else rank}"))
            elif old.nbytes != new.nbytes:
                facts.append(("file", f"{name}: {new.nbytes} bytes, {old.nbytes} on rank 0"))
            else:
                facts.append(("file", f"{name}: {new.nbytes} bytes on both, with other contents"))
        if offer.files == first.files:
            facts.append(("shapes", "the files are the same; another config or other options"))
    if len(others) > 8:
        facts.append(("ranks", f"{len(others)} of {len(heard)} differ from rank 0"))
    return FormatError(
        "ranks see different checkpoints; nothing was loaded",
        facts,
        hint="fetch the same files on every host, or read='rank0'",
    )


def agree(model: nn.Module, request: LoadRequest, world: World) -> Agreement:
    """Look at model and checkpoint and agree with the other ranks on whether they fit.

    Non-persistent buffers are computed on the way; no parameter and no other buffer is touched.

    Raises:
        CoverageError: They do not fit; the same on every rank.
        DcpconvError: A rank could not tell; what it found is raised on every rank.
    """
    failure: Exception | None = None
    found: tuple[Place, ...] = ()
    restored, offer, supplied = Restored(), list[Offer](), Supplied()
    agreement: Agreement | None = None
    try:
        found, restored = _look_at_model(model, request)
        if request.read != "rank0" or world.rank == 0:
            offer[:], supplied = _look_at_source(model, request, found)
    except Exception as error:  # noqa: BLE001 - all ranks hear of it below
        failure = error
    if request.read == "rank0":
        offer = world.from_first(offer)
    if failure is None and offer:
        try:
            agreement = _account(model, request, found, restored, offer[0], supplied)
        except Exception as error:  # noqa: BLE001 - all ranks hear of it below
            failure = error
    heard = world.gather(_tell(agreement, request, failure))
    raise_first([one.failure for one in heard], cause=failure)
    if agreement is None:
        raise AssertionError("no rank failed, yet this one has nothing to go by")
    if len({one.digest for one in heard}) > 1:
        raise unlike(heard[0].source, world.gather((hostname(), agreement.offer)))
    unexpected = _judge(heard, request)
    read = agreement.read
    if read == "auto":
        read = "once" if len({one.host for one in heard}) > 1 else "all"
    return replace(agreement, unexpected=unexpected, read=read)


def _look_at_model(model: nn.Module, request: LoadRequest) -> tuple[tuple[Place, ...], Restored]:
    reshard(model)
    found = [place for place in places(model) if place.is_parameter or place.is_persistent]
    fallback = next((device_of(p, request.device) for p in found if p.is_parameter), None)
    device = request.device or fallback or torch.device("cpu")
    restored = restore_buffers(model, device)
    return entries(model, tuple(found)) if request.by_state_dict else tuple(found), restored


def _look_at_source(
    model: nn.Module, request: LoadRequest, found: Sequence[Place]
) -> tuple[list[Offer], Supplied]:
    path = locate(request.source)
    wanted = {fqn: place.shape for place in found for fqn in place.fqns}
    parameters = {place.fqns[0]: place.shape for place in found if place.is_parameter}
    supply = prepare(
        path, request.options, wanted=wanted, live=live_model(model), parameters=parameters
    )
    offer = offer_of(supply, os.fspath(request.source))
    for target in supply.coverage.targets:
        nothing = (0,) * len(target.shape)
        if any(piece.entry.factors for piece in target.pieces):
            fill_of(target, nothing, nothing)  # raises here what would leave weights half loaded
    return [offer], Supplied(
        supply,
        supply.catalog.path,
        supply.targets(),
        identities=supply.catalog.identities,
    )


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
    if request.read in {"auto", "all"}:
        for need in needs:
            supplied.fill(need.wish)
    return Agreement(
        places=found,
        restored=restored,
        offer=offer,
        account=account,
        needs=tuple(needs),
        casts=casts,
        unexpected=(),
        supplied=supplied,
        read=request.read,
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


def _tell(agreement: Agreement | None, request: LoadRequest, failure: Exception | None) -> _Heard:
    if failure is not None or agreement is None:
        return _Heard(portable(failure))
    account, offer = agreement.account, agreement.offer
    lost = [] if request.strict or request.initialises else agreement.missing()
    return _Heard(
        None,
        f"{offer.source}  {offer.form}  {offer.family}",
        f"{offer.target}  {len(account.chosen)} tensors match",
        hostname(),
        offer.digest,
        len(account.chosen),
        account.missing,
        account.unexpected,
        account.misshapen,
        account.scaled,
        tuple(Fault(p.fqn, "on the meta device; pass init_missing") for p in lost if p.is_meta),
        tuple(
            Fault(name, "buffer that is in no checkpoint and that its module does not compute")
            for name in agreement.restored.uninitialised
        ),
    )


def _judge(heard: Sequence[_Heard], request: LoadRequest) -> tuple[Fault, ...]:
    """Raise what all ranks raise, or return what is unexpected on all of them.

    Only what all have heard may be told: a rank's own path may be another.
    """
    # With pipeline parallelism ranks hold different layers: a stored key is unexpected only where
    # nobody has a place for it.
    shared = set.intersection(*({fault.key for fault in one.unexpected} for one in heard))
    unexpected = tuple(fault for fault in heard[0].unexpected if fault.key in shared)
    rows = {
        "misshapen": _merged(one.misshapen for one in heard),
        "scaled": _merged(one.scaled for one in heard),
    }
    if request.strict:
        rows = {
            "missing": _merged(one.missing for one in heard),
            "unexpected": unexpected,
            **rows,
            "garbage": _merged(one.garbage for one in heard),
        }
    else:
        rows["missing"] = _merged(one.lost for one in heard)
    counts = [f"{len(faults)} {label}" for label, faults in rows.items() if faults]
    if counts:
        raise CoverageError(
            f"the checkpoint does not fit the model: {', '.join(counts)}; nothing was loaded",
            [
                ("source", heard[0].source),
                ("model", heard[0].model),
                *(
                    (label, f"{fault.key}  {fault.why}".rstrip())
                    for label, faults in rows.items()
                    for fault in faults
                ),
            ],
            hint=request.options.advice
            if rows["scaled"]
            else _hint({label for label, faults in rows.items() if faults}, heard[0].loaded),
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
