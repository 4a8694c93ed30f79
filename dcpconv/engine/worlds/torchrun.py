"""Where processes meet that torchrun started: at the key-value store of its rendezvous.

No process group is made, and no collective is open while bytes move.

Source:
    torch 2.6 to 2.13: ``torch.distributed.rendezvous("env://")`` gives every worker a client of the
    agent's ``TCPStore``, or starts one in rank 0; ``Store.set``, ``get``, ``check`` and ``add``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from dcpconv.core.errors import DcpconvError
from dcpconv.engine.worlds.faults import GoneRankError
from dcpconv.engine.worlds.meeting import Beat, Meeting
from dcpconv.engine.worlds.seats import Seat

_MEETINGS = count()
"""Of this process; ranks meet in the same order."""

_LARGEST = 4 << 20
"""Bytes of a record that are set at a time; the store hangs up on a client that sends more than 8
MiB (``MAX_PAYLOAD_LEN`` in ``TCPStoreLibUvBackend.cpp``)."""


class StoreMeeting(Meeting):
    """The keys of a store, as one rank reads and writes them.

    Args:
        store: ``torch.distributed.Store``.
        seat: Which rank this is.
        token: Of this run.
    """

    together = "start all ranks at once, with one torchrun for each host"
    again = "run the same again: it starts clean"

    def __init__(self, store: Any, seat: Seat, token: str) -> None:
        super().__init__(Path("the store of torchrun"), seat, token, leads=seat.rank == 0)
        self._store = store

    def put(self, name: str, record: dict[str, Any]) -> None:
        text = json.dumps(record).encode()
        first, *others = (text[at : at + _LARGEST] for at in range(0, len(text), _LARGEST))
        with _lost():
            for number, part in enumerate(others, 1):
                self._store.set(f"{name}/{number}", part)
            self._store.set(name, b"%d %s" % (len(others), first))

    def get(self, name: str) -> dict[str, Any] | None:
        with _lost():
            if not self._store.check([name]):  # without it, the store waits for the key
                return None
            others, _, text = self._store.get(name).partition(b" ")
            parts = [self._store.get(f"{name}/{at}") for at in range(1, int(others) + 1)]
            record: dict[str, Any] = json.loads(b"".join([text, *parts]))
            return record

    def _take(self, name: str) -> None:
        with _lost():
            count = self._store.add(name, 1)
        if count != 1:
            raise FileExistsError(name)

    def _show(self, record: dict[str, Any]) -> None:
        self.put(f"rank-{self.seat.rank}", record)

    def _shown_by(self, rank: int) -> Beat | None:
        record = self.get(f"rank-{rank}")
        return None if record is None else Beat(**record)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of which torch derives its own, some without a name
        raise GoneRankError(
            "the store in which the ranks meet is gone",
            [("reason", (str(error).strip().splitlines() or ["unknown"])[0])],
            hint=StoreMeeting.again,
        ) from error


def meet(seat: Seat, what: str, place: object, *, hint: str) -> StoreMeeting:
    """The meeting of the processes that torchrun started with this one.

    Args:
        seat: Which rank this is.
        what: What they do together, for people: ``write into a store``.
        place: Where they do it.
        hint: The command that starts them.

    Raises:
        DcpconvError: torchrun did not start this process as that rank.
        GoneRankError: Nobody answers where it says that the ranks meet.
    """
    environment = os.environ
    told = environment.get("RANK"), environment.get("WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" not in environment or told != (str(seat.rank), str(seat.size)):
        raise DcpconvError(
            f"several processes {what} only if torchrun has started them",
            [("path", place), ("rank", f"{seat.rank} of {seat.size}")],
            hint=hint,
        )
    from torch.distributed.distributed_c10d import PrefixStore  # noqa: PLC0415 - slow import
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415 - likewise

    with _lost():
        store, *_ = next(rendezvous("env://"))
    number = next(_MEETINGS)
    prefix = f"dcpconv/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}/{number}"
    return StoreMeeting(PrefixStore(prefix, store), seat, f"{number}")
