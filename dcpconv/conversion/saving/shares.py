"""Who writes what: the fills of an outline, cut by the ranks that hold their elements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.saving.held import Tie, number_of, rank_of
from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.core.outline import Fill, Outline, Part


@dataclass(frozen=True, slots=True)
class Write:
    """The elements of one payload that one item of a rank becomes.

    Attributes:
        file: ``OutFile.name``.
        offset: Where the payload starts in it, in bytes.
        item: Number of the item in the rank's plan.
        source: Name of the item's element type.
        target: Name of the payload's element type; a cast where it differs.
        parts: Where its elements go; offsets count from the item's first byte.
    """

    file: str
    offset: int
    item: int
    source: str
    target: str
    parts: tuple[Part, ...]

    @property
    def source_dtype(self) -> DType:
        """The item's element type."""
        return BY_NAME[self.source]

    @property
    def target_dtype(self) -> DType:
        """The payload's element type."""
        return BY_NAME[self.target]

    @property
    def nbytes(self) -> int:
        """Bytes it writes."""
        return sum(part.numel for part in self.parts) * self.target_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank writes.

    Attributes:
        directory: Where the files are; the coordinator has made them, as long as they will be.
        writes: In the order of the files.
        ties: Pairs of items that must be equal, of which this rank holds the first.
        report: Of the whole result.
    """

    directory: Path
    writes: tuple[Write, ...]
    ties: tuple[Tie, ...]
    report: ConversionReport


def share_out(
    outline: Outline,
    ties: Sequence[Tie],
    *,
    ranks: int,
    directory: Path,
    report: ConversionReport,
) -> list[Share]:
    """Every rank's share, by rank; nobody writes what another one holds.

    Args:
        outline: Planned from what the ranks hold.
        ties: What the plan rests on.
        ranks: How many there are.
        directory: Where the files are.
        report: Of the whole result.
    """
    writes: list[list[Write]] = [[] for _ in range(ranks)]
    for file in outline.files:
        for offset, fill in file.payloads:
            for place, parts in _by_place(fill).items():
                write = Write(
                    file.name,
                    offset,
                    number_of(place),
                    fill.source_dtype.name,
                    fill.target_dtype.name,
                    tuple(parts),
                )
                writes[rank_of(place)].append(write)
    return [
        Share(directory, tuple(mine), tuple(tie for tie in ties if tie.rank == rank), report)
        for rank, mine in enumerate(writes)
    ]


def _by_place(fill: Fill) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = defaultdict(list)
    for part in fill.parts:
        found[part.file].append(replace(part, file=""))
    return found


def literals_of(outline: Outline) -> Iterable[tuple[str, int, bytes]]:
    """``(file, offset, bytes)`` of everything that no rank holds: headers, derived tensors."""
    for file in outline.files:
        for offset, data in file.literals:
            yield file.name, offset, data
        for offset, fill in file.payloads:
            if fill.data is not None:
                yield file.name, offset, fill.data
