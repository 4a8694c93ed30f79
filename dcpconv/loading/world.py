"""What the ranks of a process group tell each other, so that all of them end alike.

Payloads are pickled, as ``all_gather_object`` pickles them: ranks of one job trust each other.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dcpconv.core.errors import DcpconvError
from dcpconv.loading.groups import (
    all_gather,
    broadcast,
    default_store,
    minimum,
    sends_from,
    subgroup,
)

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

    @property
    def talks(self) -> Any:
        """The group for all that is no weight: over NCCL, planning would take memory of the GPU."""
        if sends_from(self.group, "cpu"):
            return self.group
        return subgroup(self.group, range(self.size))

    def gather(self, payload: Payload) -> list[Payload]:
        """What every rank has to say, by rank; meant for a few bytes from each.

        Raises:
            LostRankError: A rank does not answer.
        """
        if self.size == 1:
            return [payload]
        data = torch.frombuffer(bytearray(pickle.dumps(payload)), dtype=torch.uint8)
        with self.meeting():
            count = torch.tensor([data.numel()])
            counts = [int(one) for one in all_gather(self.talks, count, size=self.size)]
            padded = torch.zeros(max(counts), dtype=torch.uint8)
            padded[: data.numel()] = data
            heard = all_gather(self.talks, padded, size=self.size)
        return [pickle.loads(bytes(one[:n].tolist())) for one, n in zip(heard, counts, strict=True)]

    def from_first(self, payload: Payload) -> Payload:
        """What rank 0 has to say.

        Raises:
            LostRankError: It does not answer.
        """
        return self.from_rank(payload, 0)

    def from_rank(self, payload: Payload, rank: int) -> Payload:
        """What one rank has to say; the others' payload is not looked at.

        Raises:
            LostRankError: It does not answer.
        """
        if self.size == 1:
            return payload
        is_mine = self.rank == rank
        data = bytearray(pickle.dumps(payload)) if is_mine else bytearray()
        with self.meeting():
            count = torch.tensor([len(data)])
            broadcast(self.talks, count, root=rank).wait()
            data = data or bytearray(int(count))
            sent = torch.frombuffer(data, dtype=torch.uint8)
            broadcast(self.talks, sent, root=rank).wait()
        told: Payload = payload if is_mine else pickle.loads(data)
        return told

    def tell(self, payload: Payload, speaker: int, listener: int) -> Payload:
        """What one rank tells one other; all others keep what they have.

        Raises:
            LostRankError: One of the two does not answer.
        """
        if self.rank not in {speaker, listener}:
            return payload
        data = bytearray(pickle.dumps(payload)) if self.rank == speaker else bytearray()
        count = torch.tensor([len(data)])
        group = self.talks
        try:
            if self.rank == speaker:
                group.send([count], listener, 0).wait()
                group.send([torch.frombuffer(data, dtype=torch.uint8)], listener, 0).wait()
                return payload
            group.recv([count], speaker, 0).wait()
            data = bytearray(int(count))
            group.recv([torch.frombuffer(data, dtype=torch.uint8)], speaker, 0).wait()
        except RuntimeError as error:
            raise self.lost(error, [*{speaker, listener} - {self.rank}]) from error
        told: Payload = pickle.loads(data)
        return told

    def distinct(self, payload: Payload) -> list[tuple[int, Payload]]:
        """Everything that some rank has to say, once each, with the first rank that says it.

        Ranks mostly say the same, or nothing: all send a digest, and one of those that have the
        same sends what is behind it.

        Args:
            payload: What this rank says, with a ``repr`` that tells it; false for nothing.

        Raises:
            LostRankError: A rank does not answer.
        """
        mine = hashlib.sha256(repr(payload).encode()).digest()[:16] if payload else b""
        firsts: dict[bytes, int] = {}
        for rank, digest in enumerate(self.gather(mine)):
            if digest:
                firsts.setdefault(digest, rank)
        return [(rank, self.from_rank(payload, rank)) for rank in firsts.values()]

    def in_common(self, marks: bytearray) -> bytes:
        """For every place 1 where all ranks have marked it with 1, else 0.

        Args:
            marks: As many on every rank; marked in place.

        Raises:
            LostRankError: A rank does not answer.
        """
        if self.size > 1 and marks:
            with self.meeting():
                minimum(self.talks, torch.frombuffer(marks, dtype=torch.uint8))
        return bytes(marks)

    def global_rank(self, rank: int) -> int:
        """A rank of the group as the default group numbers it."""
        return dist.get_global_rank(self.group, rank)

    def require_same(self, asked: Mapping[str, object]) -> None:
        """Raises on all ranks where they ask for different things, which would leave some waiting.

        Args:
            asked: Arguments of the call that have to be the same on every rank.

        Raises:
            DcpconvError: They differ; each is listed with the first rank that says it.
        """
        told = self.distinct(tuple(asked.items()))
        if len(told) > 1:
            by_rank = [(rank, dict(said)) for rank, said in told]
            raise DcpconvError(
                "ranks call this with different arguments; nothing was loaded",
                [
                    ("argument", f"{name}={said[name]!r} on rank {rank}")
                    for name in asked
                    if len({repr(said[name]) for _, said in by_rank}) > 1
                    for rank, said in by_rank
                ],
                hint="pass the same on every rank",
            )

    def agree(self, failure: BaseException | None) -> None:
        """Return if no rank failed, else raise the same error on all of them."""
        told = portable(failure)
        failed = self.gather(told is not None)
        if any(failed):
            first = self.from_rank(told, failed.index(True))
            raise_first([first if one else None for one in failed], cause=failure)

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
    store = default_store()
    if store is not None:
        with suppress(RuntimeError):  # its host may have died: the meeting will say so
            store.set(f"{name}/{world.rank}", str(number))
    return number


def _absent(world: World, number: int) -> list[int]:
    """Ranks that have not come to a meeting; empty where it cannot be told."""
    store, name = default_store(), _name(world)
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
