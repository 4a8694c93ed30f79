"""One process beside two that write one result together."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROWS = (
    ("hf -> dcp", ("--form", "dcp"), 1.05),
    ("hf -> dcp --to lingua", ("--to", "lingua"), 0.75),
    ("hf -> torch --dtype fp32", ("--form", "torch", "--dtype", "fp32"), 0.75),
)
"""Name, options, and the ratio to reach."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Two ranks against one, medians over pairs.

    Attributes:
        name: The row's name.
        one: Seconds of one process, with one thread.
        two: Seconds of two ranks, with one thread each, from the first start to the last end.
        ratio: Median of the pairs' ratios.
        spread: Smallest and largest of them.
        target: Ratio to reach.
    """

    name: str
    one: float
    two: float
    ratio: float
    spread: tuple[float, float]
    target: float


def rows(source: Path, work: Path, *, pairs: int) -> list[Ranks]:
    """Runs one rank and two in turns, each into a fresh path."""
    found = []
    for name, options, target in ROWS:
        times: dict[int, list[float]] = {1: [], 2: []}
        for number in range(pairs):
            for count in (1, 2) if number % 2 else (2, 1):
                out = work / ("ranks.pth" if "torch" in options else "ranks")
                os.sync()
                times[count].append(_seconds(source, out, count, options))
                shutil.rmtree(out, ignore_errors=True)
                out.unlink(missing_ok=True)
        ratios = [two / one for one, two in zip(times[1], times[2], strict=True)]
        found.append(
            Ranks(
                name,
                statistics.median(times[1]),
                statistics.median(times[2]),
                statistics.median(ratios),
                (min(ratios), max(ratios)),
                target,
            )
        )
    return found


def table(found: Sequence[Ranks]) -> str:
    """Aligned rows."""
    lines = [
        f"{'case':<38} {'N = 1':>7} {'N = 2':>7} {'ratio':>6} {'min':>5} {'max':>5} {'target':>6}"
    ]
    lines += [
        f"{row.name:<38} {row.one:>7.2f} {row.two:>7.2f} {row.ratio:>6.2f} {row.spread[0]:>5.2f}"
        f" {row.spread[1]:>5.2f} {row.target:>6.2f}"
        for row in found
    ]
    return "\n".join(lines)


def _seconds(source: Path, out: Path, count: int, options: Sequence[str]) -> float:
    command = [sys.executable, "-m", "dcpconv", "convert", str(source), str(out), "-q"]
    begun = time.perf_counter()
    processes = [
        subprocess.Popen(  # noqa: S603  our own interpreter
            [*command, "--jobs", "1", "--rank", str(rank), "--of", str(count), *options],
            stdout=subprocess.DEVNULL,
        )
        for rank in range(count)
    ]
    codes = [process.wait() for process in processes]
    seconds = time.perf_counter() - begun
    if any(codes):
        raise RuntimeError(f"a rank failed: {codes}")
    return seconds
