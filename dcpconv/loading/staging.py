"""Buffers between a file and memory that it cannot be read into: casts, strides, other devices.

Tiles on their way to a CUDA device are pinned and go round in a ring: while one is copied, on a
stream beside the one that computes, the next is read.  A tile is used again once all copies out of
it have ended.  Every thread has a ring and a stream of its own.

Pinned tiles are torch's own and not in huge pages.  A ring is faulted in once per thread, 12 MiB or
3,072 small pages, and then used for all that the thread reads, while huge pages are for memory that
is filled once.  They would take memory of our own, registered with the driver, past torch's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

BUFFER = 4 << 20
"""Bytes of a staging buffer."""

_ALIGNED = 16
"""Bytes that what shares a buffer begins at multiples of: every element type can be looked at
there."""

RING = 3
"""Tiles in the ring of a thread: one that is read, one that waits for the device, one that is
copied."""


class Copied(Protocol):
    """A copy that was started."""

    def synchronize(self) -> object:
        """Wait until it has ended."""


class Device(Protocol):
    """Where destinations are that only copies reach; one per thread."""

    def begin(self) -> None:
        """Wait for work that may still use the memory that the destinations have now."""

    def buffer(self, nbytes: int) -> Tensor:
        """Memory of the host that the device can copy from."""

    def copy(self, source: Tensor, into: Tensor) -> Copied:
        """Start a copy."""

    def finish(self) -> None:
        """Wait for all copies."""


class Cuda:
    """A CUDA device: pinned buffers, and a stream beside the one that computes.

    Args:
        device: Which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def begin(self) -> None:
        """Wait for kernels that were queued before; make the device this thread's own."""
        torch.cuda.set_device(self._device)  # a new thread would pin memory for device 0
        torch.cuda.synchronize(self._device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def buffer(self, nbytes: int) -> Tensor:
        """Pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: Tensor, into: Tensor) -> Copied:
        """Start a copy on the stream beside."""
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event

    def finish(self) -> None:
        """Wait for the stream."""
        if self._stream is not None:
            self._stream.synchronize()


def is_beyond(tensor: Tensor) -> bool:
    """Whether a tensor's memory is not that of this process."""
    return tensor.device.type == "cuda"


def device_of(tensor: Tensor) -> Device:
    """How to reach the memory of a tensor that is beyond."""
    return Cuda(tensor.device)


@dataclass
class Desk:
    """What one thread works with.

    Attributes:
        device: Where destinations are; ``None`` for memory of this process.
    """

    device: Device | None = None
    _tiles: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _copies: dict[int, list[Copied]] = field(default_factory=dict)
    _turn: int = 0
    _scratch: memoryview | None = None

    def begin(self) -> None:
        """Call it before the first tile, in the thread that works here."""
        if self.device is not None:
            self.device.begin()

    def scratch(self) -> memoryview:
        """Room for short runs."""
        self._scratch = self._scratch or memoryview(bytearray(1 << 20))
        return self._scratch

    def next_tile(self) -> None:
        """Turn to tiles that nothing is being copied from."""
        if self.device is None:
            return
        self._turn = (self._turn + 1) % RING
        for copied in self._copies.pop(self._turn, ()):
            copied.synchronize()

    def tile(self, use: str, nbytes: int) -> Tensor:
        """A buffer of the current turn, one for each use."""
        key = (use, self._turn)
        tile = self._tiles.get(key)
        if tile is None or tile.numel() < nbytes:
            make: Callable[[int], Tensor] = _plain if self.device is None else self.device.buffer
            tile = self._tiles[key] = make(max(nbytes, BUFFER))
        return tile[:nbytes]

    def tiles(self, use: str, sizes: Sequence[int]) -> list[Tensor]:
        """The same for several, one behind the other; of those without bytes nothing is made."""
        ends = [*accumulate(size + -size % _ALIGNED for size in sizes)]
        whole = self.tile(use, ends[-1]) if ends[-1] else _plain(0)
        starts = (0, *ends)
        return [whole[start : start + n] for start, n in zip(starts, sizes, strict=False)]

    def deliver(self, source: Tensor, into: Tensor) -> None:
        """Put a tile where it belongs, or part of one; on a device it is then under way."""
        if self.device is None:
            into.copy_(source)
        else:
            self._copies.setdefault(self._turn, []).append(self.device.copy(source, into))

    def finish(self) -> None:
        """Wait for copies that are still under way."""
        if self.device is not None:
            self.device.finish()


def _plain(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)
