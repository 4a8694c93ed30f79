"""One of several processes that torchrun, or a person, has started for one task."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcpconv.engine.worlds.seats import Seat
    from dcpconv.plan.readers import Readers


def seat_of(rank: int | None, of: int | None) -> Seat | None:
    """Which of how many processes this is, if it is one of several."""
    if rank is None and of is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    from dcpconv.engine.worlds.seats import find_seat

    seat = find_seat(rank, of, os.environ)
    return seat if seat.size > 1 else None


@contextmanager
def naming(seat: Seat | None) -> Iterator[None]:
    """Says in an error which of several processes it is of."""
    from dcpconv.core.errors import DcpconvError

    try:
        yield
    except DcpconvError as error:
        if seat is None:
            raise
        from dcpconv.engine.worlds.faults import named
        from dcpconv.engine.worlds.seats import host

        raise named(error, rank=seat.rank, host=host()) from error


@contextmanager
def reading(seat: Seat | None, source: str, command: str) -> Iterator[Readers | None]:
    """The processes that read SRC together, of which rank 0 speaks; ``None`` where this one is
    alone.

    Args:
        seat: Which of them this is.
        source: SRC.
        command: What each was started with, for people.
    """
    if seat is None:
        yield None
        return
    from dcpconv.plan import readers

    with naming(seat), readers.reading(seat, source, command) as found:
        try:
            yield found
        finally:
            # All end now, each with its answer.  torchrun tells the others to end as soon as it
            # sees that one of them has ended with 1 or 2.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
