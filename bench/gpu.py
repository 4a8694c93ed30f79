"""How fast do weights reach a GPU, and leave it?

    python -m bench.gpu --gb 4 --runs 5 --work out

Every case is a fresh process; cases take turns, and the file is in the page cache.  The clock
starts when CUDA is up and the model is built on the meta device, and stops when the device is done.
The floor of loading is the same bytes read by as many threads into pinned buffers and copied from
there; that of saving is ``cp`` and ``fsync`` of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.data import write_llama
from bench.measure import copy_floor, in_threads, status, workplace
from bench.models import plain_lingua, plain_llama

CHUNK = 8 << 20
THREADS = 4
TARGET = 1.15
"""Of the floor of loading."""


def measure(hf: Path, work: Path, *, runs: int) -> dict[str, list[dict[str, float]]]:
    """What every run of every case took."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*CASES, SAVE, COPY)}
    for _ in range(runs):
        for name in (*CASES, SAVE):
            out = work / "saved"
            words = ["-W", "ignore", "-m", "bench.gpu", "--case", name, "--hf", str(hf)]
            told = subprocess.run(  # noqa: S603  our own interpreter
                [sys.executable, *words, "--out", str(out)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            found[name].append(json.loads(told.splitlines()[-1]))
            sys.stderr.write(f"{name}: {found[name][-1]['seconds']:.2f} s\n")  # if it is stopped
            shutil.rmtree(out, ignore_errors=True)
        found[COPY].append({"seconds": copy_floor(hf, work / "copy").seconds, "above": 0.0})
        shutil.rmtree(work / "copy")
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Seconds, ratios to the floor of the same round, and memory of the host."""
    lines = [f"{'case':<44} {'best s':>7} {'median':>7} {'to floor (min-max)':>20} {'MiB':>6}"]
    for name, several in found.items():
        seconds = [run["seconds"] for run in several]
        floor = [run["seconds"] for run in found[COPY if name in {SAVE, COPY} else FLOOR]]
        ratios = [one / other for one, other in zip(seconds, floor, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(
            f"{name:<44} {min(seconds):>7.2f} {statistics.median(seconds):>7.2f} {spread:>20}"
            f" {max(run['above'] for run in several):>6.0f}"
        )
    return "\n".join(lines)


# -- what a process does ---------------------------------------------------------------------


def _one(name: str, hf: Path, out: Path) -> dict[str, float]:
    import torch  # noqa: PLC0415 - only these processes need it
    import torch.distributed.checkpoint.hf_storage  # noqa: PLC0415
    from safetensors import torch as _  # noqa: F401, PLC0415

    import dcpconv.conversion.saving.save_weights  # noqa: PLC0415
    import dcpconv.loading.init_weights  # noqa: PLC0415

    torch.zeros(1, device="cuda")
    model = plain_lingua(hf) if "Lingua" in name else plain_llama(hf)
    run: Callable[[Any, Path], None] = CASES.get(name, _nothing)
    if name == SAVE:
        dcpconv.load_init_weights(model, hf, device="cuda")
    torch.cuda.synchronize()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before, started = status("VmRSS"), time.perf_counter()
    if name == SAVE:
        dcpconv.save_weights(model, out, to="hf", assets=hf)
    else:
        run(model, hf)
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started, "above": status("VmHWM") - before}


def _nothing(model: Any, hf: Path) -> None:
    del model, hf


def _ours(model: Any, hf: Path) -> None:
    from dcpconv import load_init_weights  # noqa: PLC0415

    load_init_weights(model, hf, device="cuda", jobs=THREADS)


def _by_default(model: Any, hf: Path) -> None:
    from dcpconv import load_init_weights  # noqa: PLC0415

    load_init_weights(model, hf, device="cuda")


def _safetensors(model: Any, hf: Path) -> None:
    """Every tensor made on the GPU, then put into the model."""
    from safetensors.torch import load_file  # noqa: PLC0415

    model.load_state_dict(load_file(hf / "model.safetensors", device="cuda"), assign=True)


def _torchs(model: Any, hf: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    model.to_empty(device="cuda")
    state = model.state_dict()
    load(state, storage_reader=HuggingFaceStorageReader(str(hf)), no_dist=True)


def _floor(model: Any, hf: Path) -> None:
    """Two pinned buffers for each thread, and nothing in between."""
    import torch  # noqa: PLC0415

    from dcpconv.engine.tensors import memory  # noqa: PLC0415

    del model
    file = hf / "model.safetensors"
    total = file.stat().st_size
    into = torch.empty(total, dtype=torch.uint8, device="cuda")
    fd = os.open(file, os.O_RDONLY)
    todo = iter(range(0, total, CHUNK))
    lock = threading.Lock()

    def loop() -> None:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        events: list[Any] = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
        turn = 0
        while True:
            with lock:
                at = next(todo, None)
            if at is None:
                break
            turn = 1 - turn
            events[turn].synchronize()
            view, done, length = memory(buffers[turn]), 0, min(CHUNK, total - at)
            while done < length:
                done += os.preadv(fd, [view[done:length]], at + done)
            with torch.cuda.stream(stream):
                into[at : at + length].copy_(buffers[turn][:length], non_blocking=True)
                events[turn].record(stream)
        stream.synchronize()

    in_threads(THREADS, loop)
    os.close(fd)


FLOOR = f"bare preadv, pinned, {THREADS} threads"
SAVE = "save_weights, from the GPU"
COPY = "cp and fsync of the result"
CASES: dict[str, Callable[[Any, Path], None]] = {
    FLOOR: _floor,
    f"load_init_weights, {THREADS} threads": _ours,
    "load_init_weights": _by_default,
    "load_init_weights, into Lingua": _by_default,
    "safetensors.torch.load_file": _safetensors,
    "torch's HuggingFaceStorageReader": _torchs,
}


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print, or be a case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gb", type=float, default=4.0, help="size of the model, in GB")
    parser.add_argument("--runs", type=int, default=5, help="runs of every case")
    parser.add_argument("--work", type=Path, default=Path("out"), help="directory to write to")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--hf", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.case is not None:
        sys.stdout.write(json.dumps(_one(options.case, options.hf, options.out)) + "\n")
        return 0
    with workplace(options.work) as work:
        hf = write_llama(work / "hf", gigabytes=options.gb)
        found = measure(hf, work, runs=options.runs)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(table(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
