"""The account of every key on both sides, from headers alone.

Every source key is used, tied, ignored for a stated reason, or unknown; every target key is
written, tied, or missing.  All of it is found before anything is moved, and all of it is listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import CoverageError
from dcpconv.core.layout import Limits, Placement
from dcpconv.sources.opening import End
from dcpconv.sources.recognition import Weights

SCHEMA = 1
"""Version of ``Coverage.to_json``; it grows when a field changes its meaning or goes away."""

How = Literal["copied", "derived", "tied"]
"""A target is one source tensor as it is, made of relabelled or several parts, or a second name."""

FAULTS = ("refused", "missing", "unknown", "misshapen", "changed")
"""Fields of a coverage whose faults say no."""

MISFITS = ("problems", *FAULTS)
"""Fields of a coverage that say no, in the order they are told."""


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
    limit: Limits = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What all pieces of a target have in common: how their elements are stored."""
        return self.entry.dtype.label + ("" if self.entry.factors is None else " in scaled blocks")


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
        values: Elements in C order of a tensor that follows from the config, without any source.
        part: What it is of, where the table names such a part of the model: a vision tower.
    """

    key: str
    shape: tuple[int, ...]
    dtype: DType
    pieces: tuple[Piece, ...]
    tied_to: str | None = None
    relabelled: tuple[str, str] | None = None
    slots: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    values: tuple[float, ...] | None = None
    part: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its sources' elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def how(self) -> How:
        """How it comes about."""
        if self.tied_to is not None:
            return "tied"
        is_whole = len(self.pieces) == 1 and self.relabelled is None
        return "copied" if is_whole and self.pieces[0].entry.shape == self.shape else "derived"


def as_stored(key: str, entry: TensorEntry, tied_to: str | None = None) -> Target:
    """A source tensor under a key of the result, unchanged."""
    return Target(key, entry.shape, entry.dtype, (Piece(entry),), tied_to)


@dataclass(frozen=True, slots=True)
class Fault:
    """A key that does not fit, and why.

    Attributes:
        key: Bare key, or the name of a feature.
        why: The reason, in words.
        slots: What it holds, where a table says.
        expected: Shape or element type it should have, where that is the trouble.
        found: What it has instead.
        kind: ``absent`` where the source lacks just the tensor of this very name, which needs no
            explanation; ``unlike`` for another shape or type; ``other`` for what ``why`` tells.
    """

    key: str
    why: str
    slots: tuple[str, ...] = ()
    expected: str = ""
    found: str = ""
    kind: Literal["absent", "unlike", "other"] = field(default="other", compare=False)

    @classmethod
    def unlike(
        cls, key: str, expected: object, found: object, slots: tuple[str, ...] = ()
    ) -> Fault:
        """A tensor of another shape or element type than it should have."""
        return cls(
            key, f"{expected} expected, {found} found", slots, str(expected), str(found), "unlike"
        )

    @classmethod
    def lacking(
        cls, key: str, lacking: Sequence[tuple[str, str]], slots: tuple[str, ...] = ()
    ) -> Fault:
        """A tensor that cannot be made, with what the source lacks for it: keys, and reasons."""
        is_itself = [needed for needed, _ in lacking] == [key]
        why = "; ".join(reason for _, reason in lacking)
        return cls(key, why, slots, kind="absent" if is_itself else "other")

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "key": self.key,
            "why": self.why,
            "slots": list(self.slots),
            "expected": self.expected,
            "found": self.found,
        }


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
        changed: Keys that hold other values than a manifest says.
        ignored: Source keys that are no part of the result, with the reason.
        aside: Those of them that are kept in a file of their own, as they are stored.
        kept: Source keys that the table does not know and that are kept as they are stored.
        tied: ``(key, owner)`` source keys that repeat another tensor.
        left: Stored keys beside the weights that do not take part: optimizer state.
        is_tied: Whether embedding and head are one tensor.
        problems: What is wrong with the source's files, one sentence each.
        read: Where the source's keys were found.
        asked: Where the target's keys were found.
        evidence: Why these namings, one sentence each.
        suggestions: What may help, one sentence each.
        notes: What else a user should know.
    """

    source: str
    target: str
    targets: tuple[Target, ...]
    missing: tuple[Fault, ...] = ()
    unknown: tuple[Fault, ...] = ()
    misshapen: tuple[Fault, ...] = ()
    refused: tuple[Fault, ...] = ()
    changed: tuple[Fault, ...] = ()
    ignored: tuple[Fault, ...] = ()
    aside: tuple[Target, ...] = ()
    kept: tuple[Fault, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    left: tuple[str, ...] = ()
    is_tied: bool = False
    problems: tuple[str, ...] = ()
    read: End = field(default_factory=End)
    asked: End = field(default_factory=End)
    evidence: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not any(getattr(self, label) for label in MISFITS)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values; ``docs/check.md`` describes the fields."""
        return {
            "schema": SCHEMA,
            "fits": bool(self),
            "source": {"family": self.source, **asdict(self.read)},
            "target": {"family": self.target, **asdict(self.asked)},
            "written": [
                {
                    "key": target.key,
                    "shape": list(target.shape),
                    "dtype": target.dtype.name,
                    "slots": list(target.slots),
                    "how": target.how,
                    "from": list(dict.fromkeys(piece.entry.key for piece in target.pieces)),
                }
                for target in self.targets
            ],
            "problems": list(self.problems),
            "refused": [fault.to_json() for fault in self.refused],
            "missing": [fault.to_json() for fault in self.missing],
            "unknown": [fault.to_json() for fault in self.unknown],
            "misshapen": [fault.to_json() for fault in self.misshapen],
            "changed": [fault.to_json() for fault in self.changed],
            "ignored": [fault.to_json() for fault in self.ignored],
            "tied": [{"key": key, "owner": owner} for key, owner in self.tied],
            "left": list(self.left),
            "evidence": list(self.evidence),
            "suggestions": list(self.suggestions),
            "notes": list(self.notes),
        }

    def facts(self) -> Iterator[tuple[str, str]]:
        """Everything that does not fit, as lines of an error."""
        for problem in self.problems:
            yield "problem", problem
        for label in FAULTS:
            for fault in getattr(self, label):
                yield label, f"{fault.key}{f'  {fault.why}' if fault.why else ''}"

    def counts(self) -> str:
        """How much of each kind does not fit: ``2 missing, 1 unknown``."""
        words = ((len(getattr(self, label)), label) for label in MISFITS)
        return ", ".join(
            f"{count} {label[:-1] if label == 'problems' and count == 1 else label}"
            for count, label in words
            if count
        )

    def require(self, source: object, *, hint: str | None = None) -> None:
        """Raises unless everything fits.

        Raises:
            CoverageError: Lists every fault.
        """
        if self:
            return
        raise CoverageError(
            f"the checkpoint does not fit: {self.counts()}; nothing was written",
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
    targets = tuple(as_stored(key, entry, weights.tied.get(key)) for key, entry in wanted.items())
    name = weights.keymap.name if weights.keymap else "as stored"
    return Coverage(
        name, name, targets, tied=tuple(weights.tied.items()), is_tied=bool(weights.tied)
    )


AS_STORED = "as stored"
"""The naming of a result whose keys are those of the source, where no table was needed."""
