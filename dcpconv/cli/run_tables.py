"""What ``dcpconv runs`` prints for people, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from dcpconv.cli.words import count, size

if TYPE_CHECKING:
    from dcpconv.runs import FoundStep, Pruning, Stripping


def lines(steps: tuple[FoundStep, ...]) -> Iterator[str]:
    """One step a line, then why steps are incomplete."""
    rows = [
        (
            "-" if step.step is None else str(step.step),
            step.layout,
            step.form or "-",
            _state(step),
            size(step.nbytes),
            _time(step.modified),
            "+".join(name.replace(" ", "_") for name in step.holds) or "-",
            str(step.path),
        )
        for step in steps
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(7)]
    for row in rows:
        number, layout, form, state, nbytes, time, holds, path = row
        yield (
            f"{number:>{widths[0]}}  {layout:<{widths[1]}}  {form:<{widths[2]}}"
            f"  {state:<{widths[3]}}  {nbytes:>{widths[4]}}  {time}  {holds:<{widths[6]}}  {path}"
        )
    for step in steps:
        for problem in step.problems:
            yield f"why  {step.path.name}: {problem}"


def pruning_lines(pruning: Pruning) -> Iterator[str]:
    """What stays and what goes, one step a line."""
    for kept in pruning.decision.kept:
        yield f"keep      {kept.step.path}  ({', '.join(kept.reasons)})"
    word = "deleted" if pruning.is_done else "delete"
    for step in pruning.decision.removed:
        yield f"{word:<9} {step.path}  {size(step.nbytes)}"
    steps = count(len(pruning.decision.removed), "step")
    if pruning.is_done:
        yield f"deleted   {steps}, {size(pruning.nbytes)}"
    else:
        yield f"would     delete {steps}, {size(pruning.nbytes)}; --yes does it"


def stripping_lines(stripping: Stripping) -> Iterator[str]:
    """What stays whole and what loses its optimizer, one step a line."""
    for step, reason in stripping.left:
        yield f"leave     {step.path}  ({reason})"
    word = "stripped" if stripping.is_done else "strip"
    for row in stripping.stripped:
        yield f"{word:<9} {row.step.path}  {size(row.nbytes)}  {' '.join(row.names)}"
    steps = count(len(stripping.stripped), "step")
    if stripping.is_done:
        yield f"stripped  {steps}, {size(stripping.nbytes)}"
    else:
        yield f"would     strip {steps}, {size(stripping.nbytes)}; --yes does it"


def _state(step: FoundStep) -> str:
    if step.problems:
        return "incomplete"
    return "stripped" if step.is_stripped else "complete"


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "-"  # no calendar has it
