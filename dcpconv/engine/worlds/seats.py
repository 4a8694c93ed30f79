"""Which of how many processes this one is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.errors import DcpconvError


class RankError(DcpconvError, RuntimeError):
    """The processes of one conversion do not agree, or one of them is gone."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Which of how many processes this one is.

    Attributes:
        rank: From 0.
        size: Processes that write one result.
        run: What tells this start of them from another; empty where nothing does.
    """

    rank: int = 0
    size: int = 1
    run: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise RankError(
                f"there is no rank {self.rank} of {self.size}",
                [("expected", f"0 to {self.size - 1}" if self.size > 0 else "one rank or more")],
                hint="ranks count from 0; subtract 1 where your scheduler counts from 1",
            )

    def require_streaming(self, *, by_torch: bool) -> None:
        """Only the streaming engine can write a part of a result.

        torch reads the whole model into every process, and its planner gives every rank a file of
        its own, so that the bytes would follow from the number of ranks.

        Raises:
            RankError: The other one was asked for.

        Source:
            torch 2.13 ``distributed/checkpoint/filesystem.py``, ``prepare_global_plan``: rank N
            writes ``__N_0.distcp``.
        """
        if by_torch:
            raise RankError(
                "--engine torch is for one process: torch reads the whole model into it",
                [("rank", f"{self.rank} of {self.size}")],
                hint="`dcpconv convert SRC MADE --engine torch` in one process, without torchrun;"
                " then convert MADE with all ranks",
            )


ALONE = Seat()


def find_seat(rank: int | None, of: int | None, environment: Mapping[str, str]) -> Seat:
    """What the user says, or else what torchrun says.

    Args:
        rank: ``--rank``.
        of: ``--of``.
        environment: Of this process.

    Raises:
        RankError: Only one of the two numbers is there, or they make no sense.

    Source:
        torch 2.13 ``distributed/run.py``, "Environment Variables".
    """
    if rank is not None or of is not None:
        if of == 1 and rank is None:
            return ALONE
        if rank is None or of is None:
            raise RankError("--rank and --of go together", hint="pass --rank I --of N")
        return Seat(rank, of)
    if "TORCHELASTIC_RUN_ID" not in environment or "RANK" not in environment:
        return ALONE
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    run = "/".join(environment.get(name, "") for name in names)
    return Seat(int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1")), run)


def host() -> str:
    """The name of this host, for people."""
    import socket  # noqa: PLC0415 - most conversions are of one process

    return socket.gethostname()


def process_space() -> str:
    """Where process ids mean what they mean here: this boot of this host, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{host()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{host()}/{os.getpid()}"  # not Linux: no other process can be looked up


def started(pid: int) -> str | None:
    """When a process of this host started, in its kernel's own count; ``None`` if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in {"Z", "X"} else fields[19]
