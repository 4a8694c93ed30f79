"""What the ranks of a process group tell each other, so that all of them end alike."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dcpconv.core.errors import DcpconvError

Payload = TypeVar("Payload")


class LostRankError(DcpconvError, RuntimeError):
    """A rank has died or hangs: the others stop within the timeout of their process group."""


@dataclass(frozen=True)
class World:
    """The ranks that load together.

    Attributes:
        group: Their process group, ``None`` for a process by itself.
        rank: This rank in the group.
        size: How many ranks.
        load: What they load, for messages.
    """

    group: Any
    rank: int
    size: int
    load: str = ""

    @classmethod
    def of(cls, group: Any = None, *, load: str = "") -> World:
        """The given group, or the default one, or this process by itself.

        Raises:
            ValueError: This process is no member of the group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1, load)
        group = group or dist.group.WORLD
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("process_group= is a group that this rank is not in")
        return cls(group, rank, dist.get_world_size(group), load)

    def gather(self, payload: Payload) -> list[Payload]:
        """What every rank has to say, by rank.

        Raises:
            LostRankError: A rank does not answer.
        """
        if self.size == 1:
            return [payload]
        heard: list[Any] = [None] * self.size
        with self.meeting():
            dist.all_gather_object(heard, payload, group=self.group)
        return heard

    def from_first(self, payload: Payload) -> Payload:
        """What rank 0 has to say.

        Raises:
            LostRankError: It does not answer.
        """
        if self.size == 1:
            return payload
        box = [payload]
        with self.meeting():
            dist.broadcast_object_list(box, src=self.global_rank(0), group=self.group)
        return box[0]

    def global_rank(self, rank: int) -> int:
        """A rank of the group as the default group numbers it."""
        return dist.get_global_rank(self.group, rank)

    def agree(self, failure: BaseException | None) -> None:
        """Return if no rank failed, else raise the same error on all of them."""
        raise_first(self.gather(portable(failure)), cause=failure)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """What all ranks do together; those that are absent when it fails are named."""
        if self.size == 1:
            yield
            return
        number = _announce(self)
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error, _absent(self, number)) from error

    def lost(self, error: RuntimeError, ranks: Sequence[int] = ()) -> LostRankError:
        """The error for a process group that has failed."""
        if isinstance(error, LostRankError):
            return error
        names = [str(rank) for rank in ranks[:8]] + (["..."] if len(ranks) > 8 else [])
        found = f"{', '.join(names)} of {self.size}" if ranks else "cannot be told"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return LostRankError(
            "a rank was lost while loading; the model's weights are not to be used",
            [
                ("load", self.load),
                ("lost", f"rank {found}" if ranks else found),
                ("here", f"rank {self.rank} on {hostname()}"),
                ("reason", reason),
            ],
            hint="look at that rank's own log, or the host's for a process killed for memory",
        )


_MEETINGS: dict[str, int] = {}
"""Meetings so far, by name of the process group: the same on all of its ranks."""


def _announce(world: World) -> int:
    """Say in the job's key-value store that this rank has come; returns the meeting's number."""
    name = _name(world)
    number = _MEETINGS[name] = _MEETINGS.get(name, 0) + 1
    store = _store()
    if store is not None:
        with suppress(RuntimeError):  # its host may have died: the meeting will say so
            store.set(f"{name}/{world.rank}", str(number))
    return number


def _absent(world: World, number: int) -> list[int]:
    """Ranks that have not come to a meeting; empty where it cannot be told."""
    store, name = _store(), _name(world)
    if store is None:
        return []
    try:
        keys = [f"{name}/{rank}" for rank in range(world.size)]
        came = [int(store.get(key)) if store.check([key]) else 0 for key in keys]
    except RuntimeError:
        return []
    return [rank for rank, last in enumerate(came) if last < number]


def _name(world: World) -> str:
    return f"dcpconv/{getattr(world.group, 'group_name', '')}"


def _store() -> Any:
    """The store that the default process group met at; ``None`` where torch hides it."""
    find = getattr(distributed_c10d, "_get_default_store", None)
    return find() if find is not None else None


def hostname() -> str:
    """Of this machine."""
    return socket.gethostname()


def portable(failure: BaseException | None) -> DcpconvError | None:
    """An error that can travel between ranks."""
    if failure is None or isinstance(failure, DcpconvError):
        return failure
    text = str(failure).strip() or type(failure).__name__
    return DcpconvError(
        "loading failed", [("reason", f"{type(failure).__name__}: {text.splitlines()[0]}")]
    )


def raise_first(
    failures: Sequence[DcpconvError | None], *, cause: BaseException | None = None
) -> None:
    """Raise the first of the ranks' errors, with the ranks it does not concern left out."""
    failed = [rank for rank, failure in enumerate(failures) if failure is not None]
    if not failed:
        return
    first = failures[failed[0]]
    assert first is not None  # noqa: S101 - for the type checker: it is one of `failed`
    facts = list(first.facts)
    if len(failed) < len(failures):
        ranks = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
        facts.append(("on ranks", f"{ranks} of {len(failures)}"))
    error = first.with_facts(facts)
    raise error from (cause if cause is not None and cause is not first else None)
