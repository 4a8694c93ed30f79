"""What runs cost, each in a fresh process; a place for them, and threads."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20

_REPORT = """
import atexit, sys
def _peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            sys.stderr.write("VmHWM " + line.split()[1] + "\\n")
atexit.register(_peak)
"""
"""Printed by the process itself at its end: the kernel forgets a process's VmHWM with it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process cost.

    Attributes:
        seconds: Wall time, from the start of the interpreter to the last synced byte.
        cpu: User and system seconds.
        peak: ``VmHWM`` in MiB; 0.0 for a command that is not Python.
    """

    seconds: float
    cpu: float
    peak: float


@dataclass(frozen=True, slots=True)
class Result:
    """A case beside its floor: medians over pairs.

    Attributes:
        name: The row's name.
        seconds: Median wall time.
        cpu: Median CPU seconds.
        peak: Largest ``VmHWM``, in MiB.
        floor: Median wall time of ``cp`` and ``fsync`` in the same run.
        ratio: Median of the pairs' ratios.
        spread: Smallest and largest of them.
        target: Ratio to reach, or ``None`` where the row is a peer.
        note: What else was seen, such as disk blocks used.
    """

    name: str
    seconds: float
    cpu: float
    peak: float
    floor: float
    ratio: float
    spread: tuple[float, float]
    target: float | None = None
    note: str = ""


def as_installed() -> dict[str, str]:
    """The environment in which the package has its bytecode, as an installed one does; where
    writing it is switched off, every run compiles."""
    names = os.environ.keys() - {"PYTHONDONTWRITEBYTECODE"}
    return {name: os.environ[name] for name in names}


def run_python(code: str, *arguments: str | os.PathLike[str]) -> Cost:
    """Runs Python code in a fresh interpreter; ``sys.argv[1:]`` are the arguments."""
    environment = {**as_installed(), "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603  our own interpreter
            [
                sys.executable,
                "-c",
                _REPORT + code,
                *(os.fspath(argument) for argument in arguments),
            ],
            stderr=log,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        errors = log.read()
    if process.returncode:
        raise RuntimeError(f"the case failed:\n{errors}")
    peaks = [line.split()[1] for line in errors.splitlines() if line.startswith("VmHWM")]
    return Cost(seconds, usage.ru_utime + usage.ru_stime, int(peaks[-1]) / 1024 if peaks else 0.0)


def status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


@contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """A directory on the disk to measure, for as long as it is needed."""
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def in_threads(count: int, loop: Callable[[], None]) -> None:
    """Run a loop in so many threads at once, to their end."""
    threads = [threading.Thread(target=loop) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def copy_floor(source: Path, target: Path) -> Cost:
    """``cp`` of the same bytes, and ``fsync`` of what it wrote: of those files and no others."""
    started = time.perf_counter()
    before = os.times()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)  # noqa: S603, S607
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    subprocess.run(["sync", *files], check=True)  # noqa: S603, S607
    after = os.times()
    cpu = (
        after.children_user - before.children_user + after.children_system - before.children_system
    )
    return Cost(time.perf_counter() - started, cpu, 0.0)


def beside_floor(
    name: str,
    case: Callable[[Path], Cost],
    *,
    source: Path,
    work: Path,
    pairs: int,
    target: float | None = None,
) -> Result:
    """Runs a case and its floor in turns, each into a fresh path, and takes medians."""
    costs: list[Cost] = []
    floors: list[Cost] = []
    for number in range(pairs):
        for costs_of, run in _in_turns(number, costs, floors, case, source):
            out = work / "out"
            _remove(out)
            os.sync()
            costs_of.append(run(out))
            _remove(out)
    ratios = [cost.seconds / floor.seconds for cost, floor in zip(costs, floors, strict=True)]
    return Result(
        name,
        statistics.median(cost.seconds for cost in costs),
        statistics.median(cost.cpu for cost in costs),
        max(cost.peak for cost in costs),
        statistics.median(cost.seconds for cost in floors),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
        target,
    )


def table(results: Sequence[Result]) -> str:
    """Aligned rows; the ratio is to the floor of the same run, and so are its extremes."""
    lines = [
        (
            f"{'case':<38} {'s':>7} {'floor':>7} {'ratio':>6} {'min':>5} {'max':>5} {'target':>6}"
            f" {'cpu s':>6} {'MiB':>6}"
        )
    ]
    for row in results:
        target = f"{row.target:.2f}" if row.target is not None else "-"
        lines.append(
            f"{row.name:<38} {row.seconds:>7.2f} {row.floor:>7.2f} {row.ratio:>6.2f}"
            f" {row.spread[0]:>5.2f} {row.spread[1]:>5.2f} {target:>6}"
            f" {row.cpu:>6.2f} {row.peak:>6.0f}  {row.note}".rstrip()
        )
    return "\n".join(lines)


def _in_turns(
    number: int,
    costs: list[Cost],
    floors: list[Cost],
    case: Callable[[Path], Cost],
    source: Path,
) -> list[tuple[list[Cost], Callable[[Path], Cost]]]:
    """Who goes first alternates, so that a drifting disk favours neither."""

    def floor(out: Path) -> Cost:
        return copy_floor(source, out)

    both = [(costs, case), (floors, floor)]
    return both if number % 2 else both[::-1]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
