"""What a conversion did, or would do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dcpconv.core.catalog import Form
from dcpconv.engine.execute import LossyCast


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a conversion.

    Attributes:
        path: As the user named it.
        form: How bytes are stored.
        family: Naming, or ``as stored`` where no table was needed or none fits.
        tensors: Keys, second names included.
        files: Files with tensor data.
        nbytes: Bytes of tensor data.
        dtypes: Labels of the element types, most bytes first.
    """

    path: str
    form: Form
    family: str
    tensors: int
    files: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relabelled:
    """Tensors whose elements changed places."""

    source_layout: str
    target_layout: str
    tensors: int


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one of several processes wrote.

    Attributes:
        rank: Which of them.
        host: Where it ran.
        nbytes: Payload bytes.
        seconds: Wall time from its first byte to its last synced one.
    """

    rank: int
    host: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did, or, after a dry run, would do.

    Attributes:
        source: Where the weights came from.
        target: Where they are now.
        copied: Tensors whose bytes went over as they are.
        relabelled: Tensors whose elements changed places, by layouts.
        cast: Tensors whose element type changed.
        lossy: Casts that lost more than rounding.
        tied: ``(key, owner)`` second names that the target holds.
        ignored: ``(key, reason)`` of source keys that were dropped.
        left: Stored keys beside the weights that did not take part.
        allowed: Features that the target cannot express and the user overruled.
        side_files: Files written beside the weights.
        notes: What else a user should know, one sentence each.
        moved: Payload bytes by how they got there; empty after a dry run.
        disk_nbytes: Bytes of all files of the result.
        seconds: Wall time; 0.0 after a dry run.
        is_dry_run: Whether nothing was written.
        merged: Tensors that adapters changed.
        fingerprint: Of the result, where it was asked for.
        fingerprint_nbytes: Bytes that were read for it alone; the others were hashed on their way.
        shares: What each rank wrote, where several processes wrote the result.
        resumed: Payload bytes of it that an earlier run of them had written.
        published_by: The rank that made the result visible.
    """

    source: Side
    target: Side
    copied: int
    relabelled: tuple[Relabelled, ...]
    cast: int
    lossy: tuple[LossyCast, ...]
    tied: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...]
    left: tuple[str, ...]
    allowed: tuple[tuple[str, str], ...]
    side_files: tuple[str, ...]
    notes: tuple[str, ...]
    moved: dict[str, int]
    disk_nbytes: int
    seconds: float
    is_dry_run: bool
    merged: int = 0
    fingerprint: str = ""
    fingerprint_nbytes: int = 0
    shares: tuple[RankShare, ...] = ()
    resumed: int = 0
    published_by: int = 0

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)
