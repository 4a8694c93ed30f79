"""One rank reads and the ranks that need the same bytes receive them, tile by tile.

Every rank walks the same list of wishes in the same order, so no rank ever waits for one that waits
for it.  A rank whose read fails keeps sending (its tiles are then meaningless) and says so at the
end, when all ranks agree on how loading went: that is how a broken disk ends in an error and not in
a process group that times out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcpconv.core.dtypes import DType
from dcpconv.core.outline import Fill
from dcpconv.engine.cast import cast
from dcpconv.loading.reading import Readable, box_of, dtype_of, memory, torch_dtype
from dcpconv.loading.regions import Need, Wish
from dcpconv.loading.world import World
from dcpconv.stores.local import Sources

MESSAGE = 8 << 20
"""Bytes that travel at a time; a rank holds two such tiles, and on CUDA two more on the device."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A wish that is read once.

    Attributes:
        wish: What is read.
        reader: The rank that reads it.
        ranks: All ranks that want it.
    """

    wish: Wish
    reader: int
    ranks: tuple[int, ...]

    def is_for_all(self, size: int) -> bool:
        """Whether every rank of a group of this size takes part."""
        return len({self.reader, *self.ranks}) == size


def share_out(
    wishes: Sequence[Sequence[Wish]], nbytes: Callable[[Wish], int], *, reader: int | None
) -> tuple[Transfer, ...]:
    """Who reads what, the same on every rank.

    Args:
        wishes: Of every rank, by rank.
        nbytes: Bytes of a wish.
        reader: The one rank that reads everything; ``None`` spreads the work over the ranks that
            want it, by bytes.
    """
    ranks: dict[Wish, list[int]] = {}
    for rank, some in enumerate(wishes):
        for wish in some:
            ranks.setdefault(wish, []).append(rank)
    load = [0] * len(wishes)
    transfers = []
    for wish, wanting in ranks.items():
        chosen = min(wanting, key=lambda rank: load[rank]) if reader is None else reader
        load[chosen] += nbytes(wish)
        transfers.append(Transfer(wish, chosen, tuple(wanting)))
    return tuple(transfers)


@dataclass
class Exchange:
    """One rank's part in all transfers.

    Attributes:
        world: The ranks.
        fill_of: How a wish is read, on the ranks that read.
        dtype_of_key: Dtype of a key as it is read.
        sources: Open files, on the ranks that read.
        device: Where tiles must be to travel.
        progress: Called with bytes that have landed here.
        losses: ``(overflowed, underflowed)`` by key.
        failure: The first thing that went wrong here.
        read: Bytes read here.
        received: Bytes received here.
    """

    world: World
    fill_of: Callable[[Wish], Fill]
    dtype_of_key: Callable[[str], DType]
    sources: Sources | None
    device: torch.device
    progress: Callable[[int], None]
    losses: dict[str, tuple[int, int]] = field(default_factory=dict)
    failure: BaseException | None = None
    read: int = 0
    received: int = 0
    _tiles: list[Tensor] = field(default_factory=list)
    _sending: list[list[Any]] = field(default_factory=lambda: [[], []])
    _turn: int = 0

    def run(self, transfers: Iterable[Transfer], needs: Mapping[Wish, Sequence[Need]]) -> None:
        """Take part in every transfer that concerns this rank."""
        for transfer in transfers:
            mine = needs.get(transfer.wish, ())
            if self.world.rank == transfer.reader:
                self._give(transfer, mine)
            elif mine:
                self._take(transfer, mine)
        for sending in self._sending:
            self._wait(sending)

    def _give(self, transfer: Transfer, mine: Sequence[Need]) -> None:
        wish, fill, box = transfer.wish, None, None
        dtype = self.dtype_of_key(wish.key)
        lands = [_Landing(need, dtype) for need in mine]
        try:
            fill = self.fill_of(wish)
            box = box_of(fill)
        except Exception as error:  # noqa: BLE001 - kept until all ranks have agreed
            self._fail(error)
        for start, stop in _intervals(wish, dtype):
            tile = self._tile((stop - start) * dtype.itemsize)
            if self.failure is None and fill is not None and box is not None:
                try:
                    self._read(box, start, stop, tile)
                    self.read += (stop - start) * fill.source_dtype.itemsize
                    for land in lands:
                        self._land(land, tile, start - wish.start)
                except Exception as error:  # noqa: BLE001 - kept until all ranks have agreed
                    self._fail(error)
            self._sending[self._turn] = self._send(tile, transfer)
        for land in lands:
            land.close()

    def _take(self, transfer: Transfer, mine: Sequence[Need]) -> None:
        wish = transfer.wish
        dtype = self.dtype_of_key(wish.key)
        lands = [_Landing(need, dtype) for need in mine]
        for start, stop in _intervals(wish, dtype):
            tile = self._tile((stop - start) * dtype.itemsize)
            self._receive(tile, transfer)
            self.received += len(tile)
            try:
                for land in lands:
                    self._land(land, tile, start - wish.start)
            except Exception as error:  # noqa: BLE001 - kept until all ranks have agreed
                self._fail(error)
        for land in lands:
            land.close()

    def _receive(self, tile: Tensor, transfer: Transfer) -> None:
        source = self.world.global_rank(transfer.reader)
        try:
            if transfer.is_for_all(self.world.size):
                dist.broadcast(tile, src=source, group=self.world.group)
            else:
                dist.recv(tile, src=source, group=self.world.group)
        except RuntimeError as error:
            raise self.world.lost(error, [transfer.reader]) from error

    def _wait(self, sending: Iterable[Any]) -> None:
        try:
            for work in sending:
                work.wait()
        except RuntimeError as error:
            raise self.world.lost(error) from error

    def _send(self, tile: Tensor, transfer: Transfer) -> list[Any]:
        others = [rank for rank in transfer.ranks if rank != self.world.rank]
        if others and transfer.is_for_all(self.world.size):
            source = self.world.global_rank(self.world.rank)
            return [dist.broadcast(tile, src=source, group=self.world.group, async_op=True)]
        return [
            dist.isend(tile, dst=self.world.global_rank(rank), group=self.world.group)
            for rank in others
        ]

    def _read(self, box: Readable, start: int, stop: int, tile: Tensor) -> None:
        assert self.sources is not None  # noqa: S101 - a reader has its files open
        staged = tile if tile.device.type == "cpu" else torch.empty(len(tile), dtype=torch.uint8)
        box.read(start, stop, sources=self.sources, into=memory(staged))
        if staged is not tile:
            tile.copy_(staged)

    def _tile(self, nbytes: int) -> Tensor:
        """A tile that nothing is being sent from."""
        self._turn = 1 - self._turn
        self._wait(self._sending[self._turn])
        self._sending[self._turn] = []
        while len(self._tiles) < 2:
            self._tiles.append(torch.empty(MESSAGE, dtype=torch.uint8, device=self.device))
        return self._tiles[self._turn][:nbytes]

    def _land(self, land: _Landing, tile: Tensor, at: int) -> None:
        over, under = land.put(tile, at)
        if over or under:
            known = self.losses.get(land.key, (0, 0))
            self.losses[land.key] = (known[0] + over, known[1] + under)
        self.progress(len(tile))

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error


class _Landing:
    """Where tiles of one wish go on this rank."""

    def __init__(self, need: Need, dtype: DType) -> None:
        self.key = need.place.fqn
        self._dtype = dtype
        self._into = need.into
        # A strided destination is rare: FSDP2 and tensor parallelism hold contiguous shards.
        self._flat = self._into.contiguous().view(-1)

    def put(self, tile: Tensor, at: int) -> tuple[int, int]:
        """Store a tile at element ``at``; returns ``(overflowed, underflowed)``."""
        values = tile.view(torch_dtype(self._dtype))
        into = self._flat[at : at + len(values)]
        if dtype_of(into) is self._dtype:
            into.copy_(values)
            return 0, 0
        staged = values.cpu()
        result = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        lost = cast(
            memory(staged),
            memory(result),
            source_dtype=self._dtype,
            target_dtype=dtype_of(into),
        )
        if result is not into:
            into.copy_(result)
        return lost

    def close(self) -> None:
        """Bring a strided destination up to date."""
        if not self._into.is_contiguous():
            self._into.copy_(self._flat.view(self._into.shape))


def _intervals(wish: Wish, dtype: DType) -> Iterable[tuple[int, int]]:
    step = MESSAGE // dtype.itemsize
    return ((at, min(at + step, wish.stop)) for at in range(wish.start, wish.stop, step))
