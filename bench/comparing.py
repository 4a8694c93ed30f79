"""``fingerprint`` and ``diff`` beside ``cat`` of the same files, what a fingerprint costs a
conversion, and the memory of a manifest.

Processes take turns, and the best of many counts: files are in the page cache, and whatever else
the machine does doubles the time of a thread.  CPU seconds are told too, as they vary less.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.data import deepseek_shapes, write_llama, write_safetensors
from bench.measure import Cost, run_python
from dcpconv import convert

RUNS = 5
_IMPORT = "import sys\nimport dcpconv\n"
_FINGERPRINT = _IMPORT + "dcpconv.fingerprint(sys.argv[1])\nassert 'torch' not in sys.modules\n"
_DIFF = _IMPORT + "dcpconv.diff(sys.argv[1], sys.argv[2])\nassert 'torch' not in sys.modules\n"
_CONVERT = (
    "import sys\nfrom dcpconv import convert\n"
    "convert(sys.argv[1], sys.argv[1] + '.out', form='dcp', to='lingua', overwrite=True{more})\n"
)
_PLAN = (
    "import sys\n"
    "from dcpconv.plan.canonical import canonical\n"
    "from dcpconv.sources.understanding import understand\n"
    "kept = canonical(understand(sys.argv[1]))\n"
)
_MANIFEST = (
    "import sys\nfrom pathlib import Path\nimport dcpconv\n"
    "dcpconv.fingerprint(sys.argv[1]).write(Path(sys.argv[2]))\n"
)
_CHANGE = """
import sys
from pathlib import Path
import torch
torch.manual_seed(0)
source, target = map(Path, sys.argv[1:])
with source.open("rb") as read, target.open("wb") as written:
    head = read.read(8)
    written.write(head + read.read(int.from_bytes(head, "little")))
    while data := read.read(32 << 20):
        values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float()
        values *= 1 + 0.01 * torch.randn(len(values))
        written.write(values.bfloat16().view(torch.uint8).numpy().tobytes())
"""
"""A fine-tuned model: every tensor changed by a hundredth of itself."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One case; ``ratio`` is the time of ``cat`` over its own, ``target`` what to reach."""

    name: str
    seconds: float
    cpu: float
    peak: float
    cat: float
    target: float | None
    limit: float | None

    @property
    def ratio(self) -> float:
        return self.cat / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        missed = (self.target is not None and self.ratio < self.target) or (
            self.limit is not None and self.peak > self.limit
        )
        return (
            f"{self.name:<36} {self.seconds:>6.2f} {self.cat:>6.2f} {self.ratio:>6.2f}"
            f" {'-' if self.target is None else f'{self.target:.2f}':>6} {self.cpu:>6.2f}"
            f" {self.peak:>6.0f}{'  missed' if missed else ''}"
        )


def table(found: Sequence[Compared]) -> str:
    """Aligned rows; the ratio is of speeds, 1 being that of ``cat``."""
    head = f"{'case':<36} {'s':>6} {'cat s':>6} {'ratio':>6} {'target':>6} {'cpu s':>6} {'MiB':>6}"
    return "\n".join((head, *map(str, found)))


def rows(work: Path, *, gb: float) -> list[Compared]:
    """Every case, and the memory that a manifest of 91,000 tensors takes above its plan."""
    place = work / "comparing"
    hf = write_llama(place / "hf", gigabytes=gb)
    lingua, tuned = place / "lingua", place / "tuned"
    convert(hf, lingua, form="dcp", to="lingua")
    tuned.mkdir()
    shutil.copy(hf / "config.json", tuned)
    run_python(_CHANGE, hf / "model.safetensors", tuned / "model.safetensors")
    found = [
        _best("fingerprint hf", _FINGERPRINT, (hf,), target=0.7, limit=100),
        _best("fingerprint dcp, rows relabelled", _FINGERPRINT, (lingua,), target=0.7, limit=100),
        _best("diff hf, dcp lingua: equal", _DIFF, (hf, lingua), target=0.7, limit=100),
        _best("diff hf, hf: all changed", _DIFF, (hf, tuned), target=0.7, limit=100),
    ]
    for name, more in (("convert", ""), ("convert --fingerprint", ", fingerprint=True")):
        code = _CONVERT.format(more=more)
        found.append(_best(f"{name}, hf to dcp lingua", code, (hf,), target=None, limit=100))
    shutil.rmtree(place)
    return [*found, _manifest(work)]


def _best(
    name: str, code: str, sources: tuple[Path, ...], *, target: float | None, limit: float | None
) -> Compared:
    costs: list[Cost] = []
    floors: list[float] = []
    for _ in range(RUNS):
        floors.append(_cat(sources))
        costs.append(run_python(code, *sources))
    return Compared(
        name,
        min(cost.seconds for cost in costs),
        min(cost.cpu for cost in costs),
        max(cost.peak for cost in costs),
        min(floors),
        target,
        limit,
    )


def _cat(sources: tuple[Path, ...]) -> float:
    files = [path for source in sources for path in sorted(source.rglob("*")) if path.is_file()]
    started = time.perf_counter()
    with Path(os.devnull).open("wb") as nothing:
        subprocess.run(["cat", *files], stdout=nothing, check=True)  # noqa: S603, S607
    return time.perf_counter() - started


def _manifest(work: Path) -> Compared:
    """All names of DeepSeek-V3 with few elements each, so that memory is that of names alone."""
    place = work / "manifest"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": "none"}))
    shapes = {key: tuple(min(n, 8) for n in shape) for key, shape in deepseek_shapes()}
    write_safetensors(place / "model.safetensors", shapes)
    plan = run_python(_PLAN, place)
    whole = run_python(_MANIFEST, place, work / "manifest.json")
    above = whole.peak - plan.peak
    shutil.rmtree(place)
    name = f"manifest of {len(shapes):,} above its plan"
    return Compared(name, whole.seconds, whole.cpu, above, 0.0, None, 60)
