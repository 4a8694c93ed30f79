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
class Owned:
    """A file that one rank writes from its first byte to its last.

    Attributes:
        name: ``OutFile.name``.
        nbytes: Its length.
        owner: The rank.
        literals: ``(offset, bytes)`` of what no rank holds; the owner's share alone has them.
    """

    name: str
    nbytes: int
    owner: int
    literals: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank writes.

    Attributes:
        directory: Where the files are, on a disk or in a store.
        writes: What this rank holds, in the order of the files.
        ties: Pairs of items that must be equal, of which this rank holds the first.
        report: Of the whole result.
        whole: Every file and who writes it, where files have to be written from the first byte to
            the last; empty where the coordinator has made them, as long as they will be, and ranks
            write where they please.
    """

    directory: Path
    writes: tuple[Write, ...]
    ties: tuple[Tie, ...]
    report: ConversionReport
    whole: tuple[Owned, ...] = ()


def share_out(
    outline: Outline,
    ties: Sequence[Tie],
    *,
    ranks: int,
    directory: Path,
    report: ConversionReport,
    by_file: bool = False,
    by_first: bool = False,
) -> list[Share]:
    """Every rank's share, by rank.

    Args:
        outline: Planned from what the ranks hold.
        ties: What the plan rests on.
        ranks: How many there are.
        directory: Where the files are.
        report: Of the whole result.
        by_file: Whether every file is written by one rank, from its first byte to its last.
        by_first: Whether that is the first rank for all of them.
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
    whole = _owned(outline, 1 if by_first else ranks) if by_file else ()
    return [
        Share(
            directory,
            tuple(mine),
            tuple(tie for tie in ties if tie.rank == rank),
            report,
            tuple(file if file.owner == rank else replace(file, literals=()) for file in whole),
        )
        for rank, mine in enumerate(writes)
    ]


def _owned(outline: Outline, ranks: int) -> tuple[Owned, ...]:
    """Who writes which file: the largest first, each to the rank with the least so far."""
    literals: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
    for name, offset, data in literals_of(outline):
        literals[name].append((offset, data))
    loads = [0] * ranks
    owners: dict[str, int] = {}
    for file in sorted(outline.files, key=lambda file: -file.nbytes):
        owners[file.name] = loads.index(min(loads))
        loads[owners[file.name]] += file.nbytes
    return tuple(
        Owned(file.name, file.nbytes, owners[file.name], tuple(literals[file.name]))
        for file in outline.files
    )


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
