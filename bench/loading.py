"""How fast, and in how much memory, do two ranks start from a Hugging Face directory?

    python -m bench.loading --gb 2.5 --work out

Every row is two fresh processes that build a Llama on the meta device, shard it with FSDP2 and fill
it.  The clock starts when both are ready to load and stops when both are done; what a conversion
before that costs is added.  Memory is each rank's ``VmHWM`` since then above what it had: its shard
is part of it, and so are pages of files that are mapped, which is how safetensors reads.  Files are
in the page cache for all rows.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bench.data import MIB, write_llama
from bench.measure import status, workplace
from bench.models import hugging_face, lingua
from bench.worlds import add_rank_options, join, leave, run_world

RANKS = 2
WALL_TARGET = 0.5
"""Of the best peer's wall time."""
PEAK_TARGET = 150
"""MiB above the shard."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """One row.

    Attributes:
        name: As printed.
        seconds: Wall time of the slower rank in the fastest run: a busy machine only adds.
        peak: Largest high-water mark of a rank above its start, in MiB.
        shard: What a rank holds afterwards, in MiB.
        ratio: Of the best peer's wall time; ``None`` for a peer.
        is_ours: Whether it has targets to meet.
    """

    name: str
    seconds: float
    peak: float
    shard: float
    ratio: float | None = None
    is_ours: bool = False

    @property
    def above(self) -> float:
        """Memory beside the shard, in MiB."""
        return self.peak - self.shard


def rows(work: Path, *, gb: float = 2.5, runs: int = 3) -> list[Loaded]:
    """Measure every case on a checkpoint of this size, written below ``work``."""
    from dcpconv import convert  # noqa: PLC0415 - the ranks must not pay for it

    hf = write_llama(work / "loading-hf", gigabytes=gb)
    pth = work / "loading.pth"
    convert(hf, pth, overwrite=True)
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CASES}
    # In turns, so that a busy machine slows all rows alike.
    for _ in range(runs):
        for name, case in CASES.items():
            source = pth if case.source == "pth" else hf
            before = 0.0
            if case.converts:
                dcp = work / "loading-dcp"
                started = time.perf_counter()
                command = [sys.executable, "-m", "dcpconv", "convert", "-q", str(hf), str(dcp)]
                subprocess.run([*command, "--to", "lingua", "--overwrite"], check=True)  # noqa: S603
                before = time.perf_counter() - started
                source = dcp
            seconds, peak, shard = _world(name, source, hf)
            spent[name].append((before + seconds, peak, shard))
    for path in (hf, work / "loading-dcp"):
        shutil.rmtree(path, ignore_errors=True)
    pth.unlink()
    seconds_of = {name: min(s for s, _, _ in found) for name, found in spent.items()}
    best = min(seconds_of[name] for name, case in CASES.items() if not case.is_ours)
    return [
        Loaded(
            name,
            seconds_of[name],
            max(peak for _, peak, _ in found),
            found[0][2],
            seconds_of[name] / best if CASES[name].is_ours else None,
            CASES[name].is_ours,
        )
        for name, found in spent.items()
    ]


def table(results: Sequence[Loaded]) -> str:
    """Aligned rows; the ratio is to the fastest peer."""
    head = f"{'case':<44} {'s':>7} {'ratio':>6} {'target':>6} {'MiB':>6} {'shard':>6}"
    lines = [f"{head} {'above':>6} {'target':>6}"]
    for row in results:
        ratio, wall, peak = "-", "-", "-"
        if row.ratio is not None:
            ratio, wall, peak = f"{row.ratio:.2f}", f"{WALL_TARGET:.2f}", f"{PEAK_TARGET}"
        lines.append(
            f"{row.name:<44} {row.seconds:>7.2f} {ratio:>6} {wall:>6} {row.peak:>6.0f}"
            f" {row.shard:>6.0f} {row.above:>6.0f} {peak:>6}"
        )
    return "\n".join(lines)


def _world(name: str, source: Path, hf: Path) -> tuple[float, float, float]:
    """``(seconds, peak MiB, shard MiB)`` of the worse rank of one run."""
    found = run_world("bench.loading", name, ranks=RANKS, places={"source": source, "hf": hf})
    seconds, peak, shard = (
        max(float(one[field]) for one in found) for field in ("seconds", "peak", "shard")
    )
    return seconds, peak, shard


# -- what a rank does ------------------------------------------------------------------------


def _rank(options: argparse.Namespace) -> NoReturn:
    import torch  # noqa: PLC0415 - only ranks need it
    import torch.distributed as dist  # noqa: PLC0415

    case = CASES[options.case]
    join(options, ranks=RANKS)
    model = case.build(options.hf)
    case.warm_up()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before, started = status("VmRSS"), time.perf_counter()
    case.load(model, options.source)
    dist.barrier()
    seconds = time.perf_counter() - started
    peak = status("VmHWM") - before
    held = sum(
        tensor.to_local().untyped_storage().nbytes()
        for tensor in set(model.parameters())
        if not tensor.is_meta
    )
    assert not any(tensor.is_meta for tensor in model.parameters())
    assert all(t.to_local().isfinite().any() for t in model.parameters() if t.to_local().numel())
    del torch
    leave({"seconds": seconds, "peak": peak, "shard": held / MIB})


def _ours(model: Any, source: Path) -> None:
    from dcpconv import load_init_weights  # noqa: PLC0415

    load_init_weights(model, source)


def _stock(model: Any, source: Path) -> None:
    """``dcp.load`` into what ``get_model_state_dict`` returns, as Lingua does."""
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    model.to_empty(device="cpu")
    state = {"model": get_model_state_dict(model)}
    load(state, checkpoint_id=source)
    set_model_state_dict(model, state["model"])


def _stock_hf(model: Any, source: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    model.to_empty(device="cpu")
    state = get_model_state_dict(model)
    load(state, storage_reader=HuggingFaceStorageReader(str(source)))
    set_model_state_dict(model, state)


def _broadcast(model: Any, source: Path) -> None:
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
        StateDictOptions,
        set_model_state_dict,
    )

    model.to_empty(device="cpu")
    state = torch.load(source, weights_only=True) if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)


def _import_ours() -> None:
    import dcpconv.loading.init_weights  # noqa: F401, PLC0415


def _import_theirs() -> None:
    import torch.distributed.checkpoint  # noqa: F401, PLC0415


@dataclass(frozen=True, slots=True)
class Case:
    """How a row loads.

    Attributes:
        build: The sharded model, from the HF directory.
        load: Fills it from the source.
        source: ``hf`` or ``pth``.
        converts: Whether the source is a DCP that is made first, on the clock.
        is_ours: Whether it is ours.
    """

    build: Callable[[Path], Any]
    load: Callable[[Any, Path], None]
    source: str = "hf"
    converts: bool = False
    is_ours: bool = False

    def warm_up(self) -> None:
        """Import what loading needs: that a trainer has torch is given."""
        _import_ours() if self.is_ours else _import_theirs()


CASES = {
    "load_init_weights, HF -> Lingua": Case(lingua, _ours, is_ours=True),
    "load_init_weights, HF -> HF": Case(hugging_face, _ours, is_ours=True),
    "dcpconv convert, then dcp.load": Case(lingua, _stock, converts=True),
    "HuggingFaceStorageReader, dcp.load": Case(hugging_face, _stock_hf),
    "torch.load on rank 0, broadcast_from_rank0": Case(hugging_face, _broadcast, source="pth"),
}


def main() -> int:
    """Measure and print, or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gb", type=float, default=2.5, help="size of the model, in GB")
    parser.add_argument("--runs", type=int, default=3, help="runs of every case")
    parser.add_argument("--work", type=Path, default=Path("out"), help="directory to write to")
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    add_rank_options(parser)
    options = parser.parse_args()
    if options.rank is not None:
        _rank(options)
    with workplace(options.work) as work:
        sys.stdout.write(table(rows(work, gb=options.gb, runs=options.runs)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
