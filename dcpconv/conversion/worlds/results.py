"""What the processes of one conversion did together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dcpconv.conversion.deciding import Decided
from dcpconv.conversion.report import RankShare
from dcpconv.conversion.summary import labels
from dcpconv.engine.execute import CastLoss, Moved, refuse_overflow, together


@dataclass(frozen=True, slots=True)
class SharedResult:
    """What all ranks did.

    Attributes:
        moved: Bytes by how they got there.
        shares: What each rank wrote.
        resumed: Payload bytes that an earlier run had written.
        notes: What else a user should know.
        published_by: The rank that made the result visible, and reports.
    """

    moved: Moved
    shares: tuple[RankShare, ...]
    resumed: int
    notes: tuple[str, ...]
    published_by: int

    @classmethod
    def of(cls, verdict: dict[str, Any]) -> SharedResult:
        """The same from the record in which the rank that leads tells it."""
        return cls(
            moved=_moved(verdict["moved"]),
            shares=tuple(RankShare(**share) for share in verdict["shares"]),
            resumed=verdict["resumed"],
            notes=tuple(verdict["notes"]),
            published_by=verdict["published_by"],
        )


def added_up(decided: Decided, records: Iterable[dict[str, Any]]) -> Moved:
    """What all ranks moved.

    Args:
        decided: The conversion.
        records: ``Moved`` of each, as JSON has it; of earlier runs too.

    Raises:
        LossyCastError: Casts overflowed.
    """
    moved = together(map(_moved, records), decided.outline)
    if "overflow" not in decided.job.aim.source.said.allow:
        refuse_overflow(moved.losses, labels(decided.planned, decided.outline))
    return moved


def _moved(record: dict[str, Any]) -> Moved:
    losses = tuple(CastLoss(**loss) for loss in record["losses"])
    return Moved(**{**record, "losses": losses})
