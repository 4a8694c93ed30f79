"""What the ranks of a process group tell each other, so that all of them end alike."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from dcpconv.core.errors import DcpconvError

Payload = TypeVar("Payload")


@dataclass(frozen=True)
class World:
    """The ranks that load together.

    Attributes:
        group: Their process group, ``None`` for a process by itself.
        rank: This rank in the group.
        size: How many ranks.
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any = None) -> World:
        """The given group, or the default one, or this process by itself."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1)
        group = group or dist.group.WORLD
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, payload: Payload) -> list[Payload]:
        """What every rank has to say, by rank."""
        if self.size == 1:
            return [payload]
        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, payload, group=self.group)
        return heard

    def from_first(self, payload: Payload) -> Payload:
        """What rank 0 has to say."""
        if self.size == 1:
            return payload
        box = [payload]
        dist.broadcast_object_list(box, src=self.global_rank(0), group=self.group)
        return box[0]

    def global_rank(self, rank: int) -> int:
        """A rank of the group as the default group numbers it."""
        return dist.get_global_rank(self.group, rank)

    def agree(self, failure: BaseException | None) -> None:
        """Return if no rank failed, else raise the same error on all of them."""
        raise_first(self.gather(portable(failure)), cause=failure)


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
