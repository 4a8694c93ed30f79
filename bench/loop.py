"""XFS and Btrfs on a loop device: file systems that share blocks between files."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from bench.cases import CASES
from bench.data import write_llama
from bench.measure import Result, beside_floor

_MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}


def mounted(kind: str, work: Path, *, gigabytes: float) -> AbstractContextManager[Path] | str:
    """A fresh file system, or the reason why there is none."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if shutil.which(_MAKE[kind][0]) is None:
        return f"{_MAKE[kind][0]} is not installed"
    image, place = work / f"{kind}.img", work / kind
    place.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(int(gigabytes * 1e9))
    made = _run([*_MAKE[kind], str(image)]) or _run(["mount", "-o", "loop", str(image), str(place)])
    if made:
        image.unlink()
        return made
    return _unmounting(image, place)


@contextmanager
def _unmounting(image: Path, place: Path) -> Iterator[Path]:
    try:
        yield place
    finally:
        _run(["umount", str(place)])
        image.unlink(missing_ok=True)


def rows(directory: Path, *, gb: float, only: str) -> list[Result]:
    """The two conversions that matter before ``torchrun``, and one back, with blocks used."""
    hf = write_llama(directory / "hf", gigabytes=gb)
    os.sync()
    results = []
    for case in CASES:
        if case.source != "hf" or only not in case.name:
            continue
        result = beside_floor(case.name, case.run(hf), source=hf, work=directory, pairs=3)
        before = used(directory)
        case.run(hf)(directory / "out")
        grown = used(directory) - before
        shutil.rmtree(directory / "out", ignore_errors=True)
        (directory / "out").unlink(missing_ok=True)
        total = sum(path.stat().st_size for path in hf.iterdir())
        results.append(replace(result, note=f"{100 * grown / total:.2f} % new blocks"))
    return results


def used(directory: Path) -> int:
    """Bytes in use on the file system of a directory, once it has come to rest: XFS and Btrfs free
    the blocks of deleted files some time later."""
    readings: list[int] = []
    while len(readings) < 4 or len(set(readings[-4:])) > 1:
        os.sync()
        state = os.statvfs(directory)
        readings.append((state.f_blocks - state.f_bfree) * state.f_frsize)
        time.sleep(0.5)
    return readings[-1]


def _run(command: list[str]) -> str | None:
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return None if found.returncode == 0 else found.stderr.strip() or f"{command[0]} failed"
