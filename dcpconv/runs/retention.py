"""Which steps of a run to keep: a pure decision, taken before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcpconv.core.errors import DcpconvError
from dcpconv.runs.finding import FoundStep

Metrics = Mapping[str, float]
"""Value of every metric at one step, by name."""


@dataclass(frozen=True, slots=True)
class Best:
    """A metric by which one step is the best: ``eval_loss:min``."""

    metric: str
    direction: Literal["min", "max"]

    @classmethod
    def parse(cls, text: str) -> Best:
        """Reads ``metric:min`` or ``metric:max``.

        Raises:
            DcpconvError: It is neither.

        >>> Best.parse("eval_loss:min")
        Best(metric='eval_loss', direction='min')
        """
        metric, _, direction = text.rpartition(":")
        if not metric or direction not in {"min", "max"}:
            raise DcpconvError(
                f"cannot tell what is best from {text!r}",
                [("expected", "METRIC:min or METRIC:max, such as eval_loss:min")],
            )
        return cls(metric, "min" if direction == "min" else "max")


@dataclass(frozen=True, slots=True)
class Kept:
    """A step that stays, and why."""

    step: FoundStep
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of every step.

    Attributes:
        kept: Steps that stay, each with its reasons, in the order of their numbers.
        removed: Steps to delete, in the order of their numbers.
        notes: What a user should know.
    """

    kept: tuple[Kept, ...]
    removed: tuple[FoundStep, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Rules that keep steps; a step that any rule keeps stays.

    The newest complete step always stays, and so does what is incomplete, stripped, reached
    through a symbolic link, or the only file of its run.  A link and its target are one step.

    Attributes:
        keep_last: The newest so many complete steps; 0 for no such rule.
        keep_every: Steps whose number it divides; 0 for no such rule.
        keep_best: The best step by each of these.
    """

    keep_last: int = 0
    keep_every: int = 0
    keep_best: tuple[Best, ...] = ()

    def __post_init__(self) -> None:
        if self.keep_last < 0 or self.keep_every < 0:
            raise DcpconvError("how many to keep cannot be negative", [("found", self)])
        if not (self.keep_last or self.keep_every or self.keep_best):
            raise DcpconvError(
                "without a rule everything but the newest step would go",
                [("expected", "keep_last, keep_every or keep_best")],
            )

    def decide(
        self,
        steps: Sequence[FoundStep],
        metrics: Mapping[int, Metrics] | None = None,
        *,
        linked: Collection[Path] = (),
    ) -> Decision:
        """What stays and what goes.

        Args:
            steps: Every step of the run.
            metrics: By step, for ``keep_best``.
            linked: Paths of steps into which links lead that stay.

        Raises:
            DcpconvError: No step has a metric that ``keep_best`` names.
        """
        ordered = sorted(steps, key=lambda step: step.order)
        complete = [step for step in counted(ordered) if step.is_complete]
        targets = {step.target for step in ordered if step.is_link} | set(linked)
        reasons: dict[int, list[str]] = {id(step): [] for step in ordered}
        for step in ordered:
            reasons[id(step)] += _untouchable(step)
            if step.path in targets:
                reasons[id(step)].append("linked")
        if complete:
            reasons[id(complete[-1])].append("newest")
        for step in complete[-self.keep_last :] if self.keep_last else ():
            reasons[id(step)].append(f"last {self.keep_last}")
        for step in complete:
            if self.keep_every and step.step is not None and step.step % self.keep_every == 0:
                reasons[id(step)].append(f"every {self.keep_every}")
        notes = []
        for best in self.keep_best:
            found, note = choose_best(best, complete, metrics or {})
            reasons[id(found)].append(f"best {best.metric}")
            notes += [note] if note else []
        return Decision(
            tuple(Kept(step, tuple(why)) for step in ordered if (why := reasons[id(step)])),
            tuple(step for step in ordered if not reasons[id(step)]),
            tuple(notes),
        )


def counted(steps: Sequence[FoundStep]) -> list[FoundStep]:
    """Steps that have a number, in their order, each once: a link to another of them is no step."""
    ordered = sorted(steps, key=lambda step: (step.is_link, step.order))
    seen: set[Path] = set()
    found = []
    for step in ordered:
        place = step.target or step.path
        if step.step is not None and place not in seen:
            found.append(step)
        seen.add(place)
    return sorted(found, key=lambda step: step.order)


def _untouchable(step: FoundStep) -> list[str]:
    if step.is_stripped and not step.problems:
        return ["stripped"]
    if not step.is_complete or step.step is None:
        return ["incomplete"]
    if step.is_link:
        return ["symbolic link"]
    return ["only one of its run"] if step.layout == "minimind" else []


def choose_best(
    best: Best, steps: Sequence[FoundStep], metrics: Mapping[int, Metrics]
) -> tuple[FoundStep, str]:
    """The best of these steps, the newest of several, and a note on those without the metric.

    Raises:
        DcpconvError: No step has the metric, or a value that compares.
    """
    valued = [
        (value, step)
        for step in steps
        if step.step is not None
        and (value := metrics.get(step.step, {}).get(best.metric)) is not None
        and math.isfinite(value)
    ]
    if not valued:
        known = sorted({name for found in metrics.values() for name in found})
        raise DcpconvError(
            f"no step has the metric {best.metric!r}",
            [("found", name) for name in known[:12]] or [("found", "no metric at all")],
            hint="trainer_state.json, metrics.json and metrics*.jsonl are read",
        )
    wanted = (min if best.direction == "min" else max)(value for value, _ in valued)
    found = [step for value, step in valued if value == wanted][-1]
    lacking = len(steps) - len(valued)
    note = f"{lacking} of {len(steps)} steps have no {best.metric}, so none of them can be best"
    return found, note if lacking else ""
