"""An error of one rank, on its way to all others."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from dcpconv.core.errors import DcpconvError
from dcpconv.engine.worlds.seats import RankError


class GoneRankError(RankError):
    """A process of the conversion has ended, or does not answer; another run goes on."""


def to_record(
    error: BaseException,
    *,
    rank: int,
    host: str,
    again: str = "run the same again: it goes on with what is written",
) -> dict[str, Any]:
    """What the others raise when this rank fails; ``again`` says what to do where it is gone.

    ``keep`` says whether what is written stays for a run that goes on: it does where a process is
    gone or was told to end, as schedulers do, and not where the user or the files say no.
    """
    if isinstance(error, DcpconvError):
        return {
            "kind": type(error).__name__,
            "headline": error.headline,
            "facts": [[label, str(value)] for label, value in _named(error, rank, host)],
            "hint": error.hint,
            "keep": isinstance(error, GoneRankError),
        }
    how = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error!r}"
    return {
        "kind": GoneRankError.__name__ if is_told(error) else RankError.__name__,
        "headline": f"rank {rank} {'was told to end' if is_told(error) else how}",
        "facts": [["rank", f"{rank} on {host}"]],
        "hint": again if is_told(error) else None,
        "keep": is_told(error),
    }


def is_told(error: BaseException) -> bool:
    """Whether a scheduler has told this process to end."""
    return isinstance(error, KeyboardInterrupt) and error.args == (signal.SIGTERM,)


def from_record(record: dict[str, Any]) -> DcpconvError:
    """The error again, of the same kind where it is one of ours."""
    kind = next((one for one in _kinds(DcpconvError) if one.__name__ == record["kind"]), RankError)
    facts = [(str(label), str(value)) for label, value in record["facts"]]
    return kind(record["headline"], facts, hint=record["hint"])


def named(error: DcpconvError, *, rank: int, host: str) -> DcpconvError:
    """The error with the rank that it is of."""
    return error.with_facts(_named(error, rank, host))


def _named(error: DcpconvError, rank: int, host: str) -> tuple[tuple[str, object], ...]:
    if any(label == "rank" for label, _ in error.facts):
        return error.facts
    return (*error.facts, ("rank", f"{rank} on {host}"))


def _kinds(kind: type[DcpconvError]) -> Iterator[type[DcpconvError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _kinds(one)
