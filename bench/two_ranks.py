"""One process, with one thread or as many as it likes, beside two with one result together."""

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

from bench.measure import as_installed

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
        free: Seconds of one process with as many threads as it likes.
        one: Seconds of one process, with one thread.
        two: Seconds of two ranks, with one thread each, from the first start to the last end.
        ratio: Median of the pairs' ratios of ``two`` to ``one``.
        spread: Smallest and largest of them.
        target: Ratio to reach.
        cpu: CPU seconds of the busier of two ranks by those of one: the ratio where neither the
            disk nor anything else on the machine takes time.  Smallest by smallest.
    """

    name: str
    free: float
    one: float
    two: float
    ratio: float
    spread: tuple[float, float]
    target: float
    cpu: float


_KINDS = ((1, None), (1, 1), (2, 1))
"""Processes, and threads of each."""


def rows(source: Path, work: Path, *, pairs: int) -> list[Ranks]:
    """Runs one rank and two in turns, each into a fresh path."""
    found = []
    for name, options, target in ROWS:
        times: dict[tuple[int, int | None], list[tuple[float, float]]] = {k: [] for k in _KINDS}
        for number in range(pairs):
            for kind in _KINDS if number % 2 else _KINDS[::-1]:
                out = work / ("ranks.pth" if "torch" in options else "ranks")
                os.sync()
                times[kind].append(_seconds(source, out, kind, options))
                shutil.rmtree(out, ignore_errors=True)
                out.unlink(missing_ok=True)
        free, one, two = ([wall for wall, _ in times[kind]] for kind in _KINDS)
        ratios = [after / before for before, after in zip(one, two, strict=True)]
        alone, shared = (min(cpu for _, cpu in times[kind]) for kind in _KINDS[1:])
        found.append(
            Ranks(
                name,
                statistics.median(free),
                statistics.median(one),
                statistics.median(two),
                statistics.median(ratios),
                (min(ratios), max(ratios)),
                target,
                shared / alone,
            )
        )
    return found


def table(found: Sequence[Ranks]) -> str:
    """Aligned rows."""
    heads = ("threads", "N = 1", "N = 2", "ratio", "min", "max", "target", "CPU")
    widths = (7, 7, 7, 6, 5, 5, 6, 5)
    named = " ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
    lines = [f"{'case':<38} {named}"]
    lines += [
        f"{row.name:<38} {row.free:>7.2f} {row.one:>7.2f} {row.two:>7.2f} {row.ratio:>6.2f}"
        f" {row.spread[0]:>5.2f} {row.spread[1]:>5.2f} {row.target:>6.2f} {row.cpu:>5.2f}"
        for row in found
    ]
    return "\n".join(lines)


def _seconds(
    source: Path, out: Path, kind: tuple[int, int | None], options: Sequence[str]
) -> tuple[float, float]:
    """Wall, and the CPU time of the busiest process."""
    count, threads = kind
    command = [sys.executable, "-m", "dcpconv", "convert", str(source), str(out), "-q", *options]
    if threads is not None:
        command += ["--jobs", str(threads)]
    begun = time.perf_counter()
    processes = [
        subprocess.Popen(  # noqa: S603  our own interpreter
            [*command, "--rank", str(rank), "--of", str(count)],
            stdout=subprocess.DEVNULL,
            env=as_installed(),
        )
        for rank in range(count)
    ]
    used = []
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        used.append(usage.ru_utime + usage.ru_stime)
    seconds = time.perf_counter() - begun
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank failed: {[process.returncode for process in processes]}")
    return seconds, max(used)
