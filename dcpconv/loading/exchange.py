"""Regions that several ranks hold: read once, split over those who hold them, and sent to the rest.

Tiles travel in an order that all ranks of a group know, a few at a time: while some are on their
way, the next ones are read and the last ones stored, by threads.  A tile that is part of one tensor
is read into the parameter, sent from there and received there; others go through buffers, four of
``TILE`` bytes per rank.  Nobody leaves early: a rank that cannot read sends what it has, remembers
the failure, and raises it once all ranks agree on how loading went.  That is how a broken disk ends
in an error and not in a process group that times out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dcpconv.core.dtypes import DType
from dcpconv.core.errors import DcpconvError
from dcpconv.core.outline import Fill
from dcpconv.engine.tensors import memory
from dcpconv.loading.groups import broadcast, subgroup
from dcpconv.loading.landing import Destination
from dcpconv.loading.reading import Readable, box_of, read_pieces, wanted
from dcpconv.loading.regions import Need, Wish
from dcpconv.loading.replicas import TILE, Piece, Tile, has_short_rows, in_turns
from dcpconv.loading.world import World
from dcpconv.stores.ahead import Ahead, Wanted
from dcpconv.stores.local import Sources

BUFFERS = 4
"""Tiles in memory per rank: two that are read or sent, two that are received or stored."""
AHEAD = 2
"""Tiles that a rank reads before it is their turn; and tiles on their way at a time."""
FETCHED = 64 << 20
"""Bytes of a store's objects that are on their way or there before a tile is read from them."""


Places = Mapping[Wish, Sequence[Destination]]
"""Where this rank wants a region; nowhere, on one that only reads it for others."""


@dataclass
class Exchange:
    """One rank's part in sending regions around.

    Attributes:
        world: The ranks.
        fill_of: How a wish is read.
        dtype_of_key: Dtype of a key as it is read.
        sources: Open files.
        device: Where tiles must be to travel.
        progress: Called with bytes that have landed here, from several threads.
        tile: Bytes of a tile at most.
        jobs: Threads that read and store.
        losses: ``(overflowed, underflowed)`` by key.
        failure: The first thing that went wrong here.
        read: Bytes read here.
        received: Bytes received here.
    """

    world: World
    fill_of: Callable[[Wish], Fill]
    dtype_of_key: Callable[[str], DType]
    sources: Sources
    device: torch.device
    progress: Callable[[int], None]
    tile: int = TILE
    jobs: int = 2
    losses: dict[str, tuple[int, int]] = field(default_factory=dict)
    failure: BaseException | None = None
    read: int = 0
    received: int = 0
    _boxes: dict[Wish, tuple[Readable, int]] = field(default_factory=dict)
    _free: SimpleQueue[Tensor] = field(default_factory=SimpleQueue)
    _made: int = 0
    _lock: Lock = field(default_factory=Lock)

    def run(
        self,
        tiles: Sequence[Tile],
        ranks: tuple[int, ...],
        readers: Sequence[int],
        needs: Mapping[Wish, Sequence[Need]],
    ) -> None:
        """Have all tiles reach all ranks; call it on each of them, with the same arguments.

        Args:
            tiles: What to send.
            ranks: Who takes part, in order.
            readers: Those who read, each a part of the tiles.
            needs: Where this rank wants what.

        Raises:
            LostRankError: A rank has died or hangs.
        """
        link = _Link(self.world, ranks, self.device)
        places = {
            piece.wish: self._destinations(piece.wish, needs) for t in tiles for piece in t.pieces
        }
        turns = in_turns(len(tiles), readers)
        with ThreadPoolExecutor(self.jobs, "exchange") as pool:
            passing = _Passing(self, link, tiles, turns, places, pool)
            try:
                for number, reader in turns:
                    passing.send(number, reader)
                passing.finish(leave=0)
            finally:
                passing.close()
        for found in places.values():
            for place in found:
                place.close()

    def _destinations(
        self, wish: Wish, needs: Mapping[Wish, Sequence[Need]]
    ) -> tuple[Destination, ...]:
        by_rows = has_short_rows(wish, self.dtype_of_key(wish.key).itemsize, nbytes=self.tile)
        return tuple(Destination(need, by_rows=by_rows) for need in needs.get(wish, ()))

    def in_place(self, tile: Tile, to: Places) -> Tensor | None:
        """The bytes of the parameter that a tile is, if it can be sent and received there."""
        if len(tile.pieces) != 1:
            return None
        (piece,) = tile.pieces
        places = to[piece.wish]
        if len(places) != 1 or not places[0].takes_bytes(
            self.dtype_of_key(piece.wish.key), self.device
        ):
            return None
        return places[0].bytes(piece.start - piece.wish.start, piece.stop - piece.wish.start)

    def buffer(self) -> Tensor | None:
        """A buffer that nothing uses; ``None`` while there is none."""
        try:
            return self._free.get_nowait()
        except Empty:
            if self._made == BUFFERS:
                return None
            self._made += 1
            return torch.empty(self.tile, dtype=torch.uint8, device=self.device)

    def free(self, buffer: Tensor) -> None:
        """Nothing uses a buffer any more."""
        self._free.put(buffer)

    def await_buffer(self) -> None:
        """Wait for a thread that stores what was received."""
        self._free.put(self._free.get())

    def read_tile(self, tile: Tile, into: Tensor, to: Places) -> None:
        """Fill a tile from the files, and store this rank's own part of it."""
        try:
            if self.failure is None:
                self._read(tile, into.view(-1)[: tile.nbytes])
                if self.in_place(tile, to) is None:
                    self._store(tile, into, to)
                else:
                    self.progress(tile.nbytes)
        except Exception as error:  # noqa: BLE001 - kept until all ranks have agreed
            self._fail(error)

    def wanted(self, tile: Tile) -> Iterator[Wanted]:
        """What a tile is read from; nothing where that cannot be told, which reading will say."""
        try:
            for piece in tile.pieces:
                box, _ = self._box(piece.wish)
                yield from wanted(box, piece.start, piece.stop)
        except DcpconvError:
            return

    def _read(self, tile: Tile, into: Tensor) -> None:
        host = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        boxes = [self._box(piece.wish) for piece in tile.pieces]
        pieces = [(b, p.start, p.stop, p.at) for (b, _), p in zip(boxes, tile.pieces, strict=True)]
        read_pieces(pieces, sources=self.sources, into=memory(host))
        if host is not into:
            into.copy_(host)
        with self._lock:
            for (_, stored), piece in zip(boxes, tile.pieces, strict=True):
                self.read += (piece.stop - piece.start) * stored

    def _box(self, wish: Wish) -> tuple[Readable, int]:
        """A wish prepared for reading, and the bytes of an element as it is stored."""
        with self._lock:
            if wish not in self._boxes:
                fill = self.fill_of(wish)
                self._boxes[wish] = box_of(fill), fill.source_dtype.itemsize
            return self._boxes[wish]

    def store_received(self, tile: Tile, buffer: Tensor, to: Places) -> None:
        try:
            self._store(tile, buffer, to)
        except Exception as error:  # noqa: BLE001 - kept until all ranks have agreed
            self._fail(error)
        finally:
            self._free.put(buffer)

    def _store(self, tile: Tile, buffer: Tensor, to: Places) -> None:
        for piece in tile.pieces:
            for place in to[piece.wish]:
                self._put(piece, buffer, place)

    def _put(self, piece: Piece, buffer: Tensor, place: Destination) -> None:
        dtype = self.dtype_of_key(piece.wish.key)
        nbytes = (piece.stop - piece.start) * dtype.itemsize
        at = piece.start - piece.wish.start
        over, under = place.put(buffer.view(-1)[piece.at : piece.at + nbytes], dtype, at)
        with self._lock:
            if over or under:
                known = self.losses.get(place.key, (0, 0))
                self.losses[place.key] = (known[0] + over, known[1] + under)
        self.progress(nbytes)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error


class _Passing:
    """Tiles of one group on their way: which are being read, and which are being sent.

    Args:
        exchange: Whose tiles they are.
        link: How they travel.
        tiles: All of them.
        turns: ``(tile, its reader)`` in the order to send.
        places: Where this rank wants what.
        pool: Threads that read and store.
    """

    def __init__(
        self,
        exchange: Exchange,
        link: _Link,
        tiles: Sequence[Tile],
        turns: Sequence[tuple[int, int]],
        places: Places,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._exchange = exchange
        self._link = link
        self._tiles = tiles
        self._places = places
        self._pool = pool
        self._me = exchange.world.rank
        mine = {id(tiles[number]): number for number, reader in turns if reader == self._me}
        self._numbers = mine
        own = [tiles[number] for number in mine.values()]
        self._to_read = Ahead(exchange.sources, own, exchange.wanted, most=FETCHED)
        self._next: Tile | None = None
        self._reads: dict[int, Future[Tensor]] = {}
        self._sent: deque[tuple[Any, Tile, Tensor, bool]] = deque()

    def send(self, number: int, reader: int) -> None:
        """Have one tile on its way; called for all tiles, in the order of their turns."""
        tile = self._tiles[number]
        self._read_ahead()
        if reader == self._me:
            while number not in self._reads:
                self._make_room()
                self._read_ahead()
            room = self._reads.pop(number).result()
            self._read_ahead()
        else:
            while (found := self._room(tile)) is None:
                self._make_room()
            room = found
        work = self._link.send(room.view(-1)[: tile.nbytes], reader)
        self._sent.append((work, tile, room, reader == self._me))
        self.finish(leave=AHEAD)

    def finish(self, *, leave: int) -> None:
        """Wait for tiles until only so many are on their way."""
        exchange = self._exchange
        while len(self._sent) > leave:
            work, tile, room, is_mine = self._sent.popleft()
            self._link.wait(work)
            is_in_place = exchange.in_place(tile, self._places) is not None
            if not is_mine:
                exchange.received += tile.nbytes
            if is_in_place and not is_mine:
                exchange.progress(tile.nbytes)
            elif is_mine and not is_in_place:
                exchange.free(room)
            elif not is_mine:
                self._pool.submit(exchange.store_received, tile, room, self._places)

    def close(self) -> None:
        """Nothing more is read."""
        self._to_read.close()

    def _read_ahead(self) -> None:
        while len(self._reads) < AHEAD:
            tile = self._next = self._next or next(self._to_read, None)
            room = self._room(tile) if tile is not None else None
            if tile is None or room is None:
                return
            self._next = None
            self._reads[self._numbers[id(tile)]] = self._pool.submit(self._read, tile, room)

    def _read(self, tile: Tile, room: Tensor) -> Tensor:
        self._exchange.read_tile(tile, room, self._places)
        self._to_read.done(tile)
        return room

    def _room(self, tile: Tile) -> Tensor | None:
        place = self._exchange.in_place(tile, self._places)
        return place if place is not None else self._exchange.buffer()

    def _make_room(self) -> None:
        if self._sent:
            self.finish(leave=len(self._sent) - 1)
        else:
            self._exchange.await_buffer()


@dataclass
class _Link:
    """How tiles reach the ranks of a group.

    Attributes:
        world: All ranks that load.
        ranks: Those of the group.
        device: Where tiles are.
    """

    world: World
    ranks: tuple[int, ...]
    device: torch.device
    group: Any = None

    def __post_init__(self) -> None:
        if len(self.ranks) == self.world.size or self.is_pair:
            self.group = self.world.group
            return
        try:
            self.group = subgroup(self.world.group, self.ranks, kind=self.device.type)
        except RuntimeError as error:
            raise self.world.lost(error) from error

    @property
    def is_pair(self) -> bool:
        """Two of more ranks send to each other as they are: rank 0 of many would else need a group
        with each of the others."""
        return len(self.ranks) == 2 < self.world.size

    def send(self, tile: Tensor, reader: int) -> tuple[Any, int]:
        """Starts sending a tile from its reader to all others."""
        try:
            if not self.is_pair:
                return broadcast(self.group, tile, root=self.ranks.index(reader)), reader
            (other,) = {*self.ranks} - {self.world.rank}
            way = self.group.send if reader == self.world.rank else self.group.recv
            return way([tile], other, 0), reader
        except RuntimeError as error:
            raise self.world.lost(error, [reader]) from error

    def wait(self, sent: tuple[Any, int]) -> None:
        """Wait for a tile."""
        work, reader = sent
        try:
            work.wait()
        except RuntimeError as error:
            others = [rank for rank in self.ranks if rank != self.world.rank]
            lost = [reader] if reader != self.world.rank else others if len(others) == 1 else []
            raise self.world.lost(error, lost) from error
