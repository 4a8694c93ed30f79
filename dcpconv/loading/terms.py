"""What the ranks agree on: what is wanted, what is there, and who has a place for what."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from dcpconv.core.catalog import Catalog
from dcpconv.core.dtypes import DType
from dcpconv.core.outline import Fill
from dcpconv.loading.account import Account, Offer
from dcpconv.loading.buffers import Restored
from dcpconv.loading.catalogs import Opener
from dcpconv.loading.model import Place
from dcpconv.loading.regions import Need, Wish
from dcpconv.loading.shares import Shares
from dcpconv.loading.supply import Options, Supply
from dcpconv.plan.coverage import Fault, Target
from dcpconv.plan.fills import fill_of
from dcpconv.sources.understanding import Source

ReadMode = Literal["auto", "all", "host", "once", "rank0"]
LoadEngine = Literal["auto", "direct", "torch"]


def require_module(model: object) -> None:
    """Raises where what is to be filled is no module.

    Raises:
        TypeError: It is a state dict, for instance.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model= is a {type(model).__name__}, not a torch.nn.Module; to fill a state dict:"
            " dcp.load(state_dict, storage_reader=CheckpointReader(source))"
        )


def require_one_of(name: str, value: object, *choices: object) -> None:
    """Raises where an argument is none of its choices.

    Raises:
        ValueError: It names them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


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
        huge_pages: Whether memory that is allocated is to be in huge pages.
        opener: Opens the source, where it is more than weights.
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
    huge_pages: bool = False
    opener: Opener[Source] | None = None


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
class Addition:
    """What is to be loaded beside the weights.

    Attributes:
        needs: Every region that this rank holds of it.
        targets: Its tensors, by the keys of the needs.
        faults: What does not fit on this rank.
        idle: Names of what is stored and that this rank has no place for.
        names: All names of which ``idle`` are some, alike on all ranks.
    """

    needs: tuple[Need, ...] = ()
    targets: Mapping[str, Target] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    idle: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()


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
        addition: What is loaded beside the weights.
        differing: FQNs that are another's in the model and hold other values in the source.
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
    addition: Addition = field(default_factory=Addition)
    differing: tuple[Fault, ...] = ()

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
