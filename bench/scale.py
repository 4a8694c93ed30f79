"""How planning, checking and converting grow: from 100 tensors to a 671B shape of 91,000.

The tensors are holes, so a terabyte fits on any disk; headers, keys and offsets are real.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bench import loop
from bench.data import deepseek_shapes, write_sparse
from bench.measure import run_python

COUNTS = (100, 1_000, 10_000, 100_000)
_IMPORT = "import sys\nimport dcpconv\n"
_PLAN = _IMPORT + "dcpconv.convert(sys.argv[1], sys.argv[2], form='dcp', dry_run=True)\n"
_CHECK = _IMPORT + "dcpconv.check(sys.argv[1])\n"
_CONVERT = _IMPORT + "dcpconv.convert(sys.argv[1], sys.argv[2], form='dcp')\n"


@dataclass(frozen=True, slots=True)
class Growth:
    """One measurement.

    Attributes:
        what: ``plan``, ``check`` or ``convert on xfs``.
        tensors: How many.
        terabytes: Apparent size.
        seconds: Wall time of the whole process.
        peak: ``VmHWM`` in MiB.
    """

    what: str
    tensors: int
    terabytes: float
    seconds: float
    peak: float

    def __str__(self) -> str:
        return (
            f"{self.what:<16} {self.tensors:>8,} tensors {self.terabytes:>7.3f} TB"
            f" {self.seconds:>7.2f} s {self.peak:>6.0f} MiB"
        )


def rows(work: Path) -> list[Growth]:
    """Plan and check at every size, and the largest converted on XFS where that can be mounted."""
    shapes = dict(deepseek_shapes(layers=68))
    found: list[Growth] = []
    for count in COUNTS:
        source = work / f"sparse-{count}"
        few = dict(islice(shapes.items(), count))
        total = write_sparse(source, few, files=max(1, round(163 * count / 91_000)))
        for what, code in (("plan", _PLAN), ("check", _CHECK)):
            cost = run_python(code, source, work / "none")
            found.append(Growth(what, len(few), total / 1e12, cost.seconds, cost.peak))
        shutil.rmtree(source)
    place = loop.mounted("xfs", work, gigabytes=40)
    if isinstance(place, str):
        return found
    with place as directory:
        source = directory / "671b"
        few = dict(deepseek_shapes())
        total = write_sparse(source, few, files=163)
        for what, code in (("check", _CHECK), ("convert on xfs", _CONVERT)):
            cost = run_python(code, source, directory / "out")
            found.append(Growth(what, len(few), total / 1e12, cost.seconds, cost.peak))
    return found
