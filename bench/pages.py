"""Whether huge pages make reading into fresh memory faster, where memory is what loading waits for.

    python -m bench.pages --mb 1024 --runs 9 --work out

A file that is in the page cache is read into the storages of new tensors, as a model gets them on
leaving the meta device, by two threads with plain ``preadv``.  Pages as the system gives them and
``MADV_HUGEPAGE`` take turns in one process, so all memory but that of the first turn has been used
by it before.  A busy machine slows both alike: what counts is the ratio of their times, of the best
and of the medians, and of the CPU seconds, which waiting for the machine does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench.measure import in_threads

MIB = 1 << 20
TENSOR = 16 * MIB
"""Bytes of each tensor: about a layer's matrix, and more than glibc keeps when it is freed."""
THREADS = 2
CASES = ("small", "huge")


def measure(file: Path, *, runs: int) -> dict[str, list[tuple[float, float]]]:
    """``(seconds, CPU seconds)`` of every run of both cases, in turns."""
    nbytes = file.stat().st_size // TENSOR * TENSOR
    found: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    for turn in range(runs):
        for case in CASES if turn % 2 else CASES[::-1]:
            before = time.process_time()
            seconds = _read(file, nbytes, is_huge=case == "huge")
            found[case].append((seconds, time.process_time() - before))
    return found


def _read(file: Path, nbytes: int, *, is_huge: bool) -> float:
    import torch  # noqa: PLC0415 - not for --help

    from dcpconv.engine.tensors import memory  # noqa: PLC0415
    from dcpconv.loading.pages import use_huge_pages  # noqa: PLC0415

    tensors = [torch.empty(TENSOR, dtype=torch.uint8) for _ in range(nbytes // TENSOR)]
    started = time.perf_counter()
    if is_huge:
        for tensor in tensors:
            use_huge_pages(tensor)
    todo = iter(enumerate(tensors))
    lock = threading.Lock()

    def loop() -> None:
        while True:
            with lock:
                number, tensor = next(todo, (-1, None))
            if tensor is None:
                return
            os.preadv(fd, [memory(tensor)], number * TENSOR)

    fd = os.open(file, os.O_RDONLY)
    in_threads(THREADS, loop)
    os.close(fd)
    return time.perf_counter() - started


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Seconds of both cases, best and median, and CPU seconds; ratios of huge pages to small."""
    lines = [f"{'pages':<8} {'best s':>8} {'median s':>9} {'CPU s':>7}"]
    rows = {
        case: (
            min(seconds for seconds, _ in times),
            statistics.median(seconds for seconds, _ in times),
            statistics.median(cpu for _, cpu in times),
        )
        for case, times in found.items()
    }
    rows["ratio"] = tuple(h / s for h, s in zip(rows["huge"], rows["small"], strict=True))  # type: ignore[assignment]
    lines += [f"{case:<8} {b:>8.2f} {m:>9.2f} {c:>7.2f}" for case, (b, m, c) in rows.items()]
    return "\n".join(lines)


def run(work: Path, *, mb: int = 512, runs: int = 15) -> dict[str, list[tuple[float, float]]]:
    """Measure with a file of its own below ``work``."""
    with tempfile.NamedTemporaryFile(dir=work) as file:
        block = os.urandom(MIB)
        for _ in range(mb):
            file.write(block)
        file.flush()
        return measure(Path(file.name), runs=runs)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--mb", type=int, default=1024, help="bytes to read, in MiB")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--work", type=Path, default=Path("out"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    options.work.mkdir(parents=True, exist_ok=True)
    found = run(options.work, mb=options.mb, runs=options.runs)
    if options.json:
        options.json.write_text(json.dumps(found))
    sys.stdout.write(table(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
