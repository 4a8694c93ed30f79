"""The account of every key on both sides, from headers alone.

Every source key is used, tied, ignored for a stated reason, or unknown; every target key is
written, tied, or missing.  All of it is found before anything is moved, and all of it is listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dcpconv.catalog import TensorEntry
from dcpconv.dtypes import DType
from dcpconv.errors import CoverageError
from dcpconv.layout import Box, Placement
from dcpconv.recognition import Weights


@dataclass(frozen=True, slots=True)
class Piece:
    """The share of one source tensor in one target tensor.

    Attributes:
        entry: The source tensor.
        placed: Where the slot lies in it; ``None`` where both sides store it the same way.
        wanted: Where the slot lies in the target tensor; ``None`` likewise.
        limit: Values of index axes that a key fixes on one side: expert 3 of a stacked tensor.
    """

    entry: TensorEntry
    placed: Placement | None = None
    wanted: Placement | None = None
    limit: Box = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """One key of the result and what it is made of.

    Attributes:
        key: Bare key in the target naming.
        shape: Its shape, in elements.
        dtype: Element type of its sources.
        pieces: Parts of source tensors that cover it.
        tied_to: Key of the target that it repeats, if it is a second name.
        relabelled: ``(source layout, target layout)`` where elements change places.
        slots: What it holds, for reports; empty where no table was needed.
        indices: Layer and expert numbers in the key.
    """

    key: str
    shape: tuple[int, ...]
    dtype: DType
    pieces: tuple[Piece, ...]
    tied_to: str | None = None
    relabelled: tuple[str, str] | None = None
    slots: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """A key that does not fit, and why."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """Who becomes what, and what is left over.

    Attributes:
        source: Name of the source's naming, or ``as stored``.
        target: Name of the target's naming, or ``as stored``.
        targets: Every key of the result, in the order of the target's table.
        missing: Target keys that the source cannot supply.
        unknown: Source keys that no rule covers.
        misshapen: Keys whose shape or element type contradicts the config or another tensor.
        refused: Features of the model that the target cannot express; ``key`` is their name.
        ignored: Source keys that are dropped, with the reason.
        tied: ``(key, owner)`` source keys that repeat another tensor.
        left: Stored keys beside the weights that do not take part: optimizer state.
        is_tied: Whether embedding and head are one tensor.
    """

    source: str
    target: str
    targets: tuple[Target, ...]
    missing: tuple[Fault, ...] = ()
    unknown: tuple[Fault, ...] = ()
    misshapen: tuple[Fault, ...] = ()
    refused: tuple[Fault, ...] = ()
    ignored: tuple[Fault, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    left: tuple[str, ...] = ()
    is_tied: bool = False

    def __bool__(self) -> bool:
        return not (self.missing or self.unknown or self.misshapen or self.refused)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Everything that does not fit, as lines of an error."""
        for label in ("refused", "missing", "unknown", "misshapen"):
            for fault in getattr(self, label):
                yield label, f"{fault.key}{f'  {fault.why}' if fault.why else ''}"

    def require(self, source: object, *, hint: str | None = None) -> None:
        """Raises unless everything fits.

        Raises:
            CoverageError: Lists every fault.
        """
        if self:
            return
        counts = [
            f"{len(faults)} {label}"
            for label in ("refused", "missing", "unknown", "misshapen")
            if (faults := getattr(self, label))
        ]
        raise CoverageError(
            f"the checkpoint does not fit: {', '.join(counts)}; nothing was written",
            [
                ("source", f"{source} ({self.source})"),
                ("target", f"{self.target} ({len(self.targets)} keys matched)"),
                *self.facts(),
            ],
            hint=hint,
        )


def cover_as_stored(weights: Weights, *, keys: Iterable[str] | None = None) -> Coverage:
    """The account of a conversion that keeps every key and layout.

    Args:
        weights: The source.
        keys: Bare keys to take; all by default.
    """
    wanted = weights.entries if keys is None else {k: weights.entries[k] for k in keys}
    targets = tuple(
        Target(key, entry.shape, entry.dtype, (Piece(entry),), weights.tied.get(key))
        for key, entry in wanted.items()
    )
    name = weights.keymap.name if weights.keymap else "as stored"
    return Coverage(
        name, name, targets, tied=tuple(weights.tied.items()), is_tied=bool(weights.tied)
    )
