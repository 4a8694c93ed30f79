"""What ranks take to load, beside the least that it can take: bare reads, and one rank alone.

    python -m bench.sharing --gb 1.2 --runs 5 --work out

Every case is fresh processes, one per rank, that build a model of a Llama's parameters on the meta
device, shard it and fill it; two hosts are emulated by their names.  Cases take turns.  The clock
runs from when all ranks are ready to when all are done.  The table has ratios of best and of median
times, and says which targets they miss; CPU seconds are those of all ranks together, which waiting
for a busy machine does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from bench.data import write_llama
from bench.measure import in_threads, status, workplace
from bench.worlds import add_rank_options, join, leave, run_world

CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """How ranks load.

    Attributes:
        ranks: How many.
        wrap: ``fsdp2``, ``ddp``, ``tp`` or ``none``.
        way: ``ours``, ``torch`` for its Hugging Face reader, ``preadv`` for bare reads of as many
            bytes into huge pages, ``dd``.
        read: As ``load_init_weights`` takes it.
        hosts: How many there seem to be.
        is_cold: Whether the file is dropped from the page cache first.
    """

    ranks: int
    wrap: str
    way: str = "ours"
    read: str = "all"
    hosts: int = 1
    is_cold: bool = False


CASES = {
    "preadv": Case(2, "fsdp2", "preadv"),
    "fsdp2 all": Case(2, "fsdp2"),
    "fsdp2 once": Case(2, "fsdp2", read="once", hosts=2),
    "fsdp2 torch": Case(2, "fsdp2", "torch"),
    "tp ours": Case(2, "tp"),
    "tp torch": Case(2, "tp", "torch"),
    "ddp once": Case(4, "ddp", read="once", hosts=4),
    "ddp all": Case(4, "ddp"),
    "one rank": Case(1, "none"),
    "cold ours": Case(2, "fsdp2", is_cold=True),
    "cold dd": Case(1, "none", "dd", is_cold=True),
}
ROWS = (
    ("FSDP2, 2 ranks, to bare preadv into huge pages", "fsdp2 all", "preadv", 1.15),
    ("FSDP2, 2 ranks, to torch's HF reader", "fsdp2 all", "fsdp2 torch", 0.6),
    ("TP columns, 2 ranks, to torch's HF reader", "tp ours", "tp torch", 0.7),
    ("FSDP2 on 2 emulated hosts, once to all", "fsdp2 once", "fsdp2 all", 1.05),
    ("DDP, 4 ranks, once, to one rank's read", "ddp once", "one rank", 1.3),
    ("DDP, 4 ranks, all, to one rank's read", "ddp all", "one rank", None),
    ("FSDP2, cold cache, to dd of the file", "cold ours", "cold dd", 1.1),
)


def measure(hf: Path, *, runs: int, only: str) -> dict[str, list[dict[str, float]]]:
    """What every run of every case took."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES if name.startswith(only)}
    for _ in range(runs):
        for name, several in found.items():
            several.append(_world(name, hf))
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Ratios beside their targets, and what was read and held."""
    lines = [f"{'what':<48} {'best':>6} {'median':>7} {'target':>7}"]
    for what, case, base, target in ROWS:
        if case not in found or base not in found:
            continue
        ours = [run["seconds"] for run in found[case]]
        theirs = [run["seconds"] for run in found[base]]
        best = min(ours) / min(theirs)
        middle = statistics.median(ours) / statistics.median(theirs)
        wanted = "-" if target is None else f"{target:.2f}"
        lines.append(f"{what:<48} {best:>6.2f} {middle:>7.2f} {wanted:>7}")
    heads = f"{'best s':>7} {'median':>7} {'CPU s':>7} {'bytes read':>11} {'MiB above':>10}"
    lines += ["", f"{'case':<14} {heads}"]
    for case, several in found.items():
        seconds = [run["seconds"] for run in several]
        lines.append(
            f"{case:<14} {min(seconds):>7.2f} {statistics.median(seconds):>7.2f}"
            f" {min(run['cpu'] for run in several):>7.2f}"
            f" {several[0]['read']:>9.2f} x {max(run['above'] for run in several):>10.0f}"
        )
    return "\n".join(lines)


def _world(name: str, hf: Path) -> dict[str, float]:
    case = CASES[name]
    file = hf / "model.safetensors"
    if case.is_cold:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if case.way == "dd":
        spent = sum(os.times()[2:4])
        started = time.perf_counter()
        command = ["dd", f"if={file}", "of=/dev/null", "bs=4M", "status=none"]
        subprocess.run(command, check=True)  # noqa: S603
        seconds, after = time.perf_counter() - started, os.times()
        cpu = after.children_user + after.children_system - spent
        return {"seconds": seconds, "cpu": cpu, "read": 1.0, "above": 0.0}
    ranks = run_world("bench.sharing", name, ranks=case.ranks, places={"hf": hf})
    return {
        "seconds": max(rank["seconds"] for rank in ranks),
        "cpu": sum(rank["cpu"] for rank in ranks),
        "read": sum(rank["read"] for rank in ranks) / file.stat().st_size,
        "above": max(rank["above"] for rank in ranks),
    }


# -- what a rank does ------------------------------------------------------------------------


def _rank(options: argparse.Namespace) -> NoReturn:
    import torch.distributed as dist  # noqa: PLC0415 - only ranks need it

    case = CASES[options.case]
    join(options, ranks=case.ranks)
    model = _model(case.wrap, options.hf)
    load = {"ours": _ours, "torch": _torch, "preadv": _preadv}[case.way]
    import torch.distributed.checkpoint.hf_storage  # noqa: F401, PLC0415

    import dcpconv.loading.init_weights  # noqa: F401, PLC0415

    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before, started, busy = status("VmRSS"), time.perf_counter(), time.process_time()
    read = load(case, model, options.hf, options.rank)
    cpu = time.process_time() - busy
    dist.barrier()
    seconds, peak = time.perf_counter() - started, status("VmHWM") - before
    held = (
        read
        if case.way == "preadv"
        else sum(
            _local(p).untyped_storage().nbytes()
            for p in model.parameters()
            if not _local(p).is_meta
        )
    )
    leave({"seconds": seconds, "cpu": cpu, "read": read, "above": peak - held / (1 << 20)})


def _local(parameter: Any) -> Any:
    found = parameter.detach()
    return found.to_local() if hasattr(found, "to_local") else found


def _model(wrap: str, hf: Path) -> Any:
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415
    from torch.distributed.tensor import Shard, distribute_tensor  # noqa: PLC0415

    from bench.models import plain_llama  # noqa: PLC0415

    model = plain_llama(hf)
    if wrap == "fsdp2":
        for layer in model.get_submodule("model.layers").children():
            fully_shard(layer)
        fully_shard(model)
    elif wrap == "tp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name, parameter in [*model.named_parameters()]:
            if parameter.dim() == 2:
                parent, _, last = name.rpartition(".")
                split = distribute_tensor(parameter.data, mesh, [Shard(1)])
                made = type(parameter)(split, requires_grad=False)
                setattr(model.get_submodule(parent), last, made)
    return model


def _ours(case: Case, model: Any, hf: Path, rank: int) -> int:
    from dcpconv import load_init_weights  # noqa: PLC0415
    from dcpconv.loading import catalogs  # noqa: PLC0415

    host = f"host-{rank * case.hosts // case.ranks}"
    with patch.object(catalogs, "hostname", lambda: host):
        read: Any = case.read
        return load_init_weights(model, hf, read=read).nbytes_read


def _torch(case: Case, model: Any, hf: Path, rank: int) -> int:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    del case, rank
    model.to_empty(device="cpu")
    state = get_model_state_dict(model)
    load(state, storage_reader=HuggingFaceStorageReader(str(hf)))
    set_model_state_dict(model, state)
    return (hf / "model.safetensors").stat().st_size


def _preadv(case: Case, model: Any, hf: Path, rank: int) -> int:
    """This rank's share of the file, by two threads, with nothing in between."""
    import threading  # noqa: PLC0415

    import torch  # noqa: PLC0415

    from dcpconv.engine.tensors import memory  # noqa: PLC0415
    from dcpconv.loading.pages import use_huge_pages  # noqa: PLC0415

    del model
    file = hf / "model.safetensors"
    total = file.stat().st_size
    begin, end = total * rank // case.ranks, total * (rank + 1) // case.ranks
    into = torch.empty(end - begin, dtype=torch.uint8)
    use_huge_pages(into)
    view = memory(into)
    fd = os.open(file, os.O_RDONLY)
    todo = iter(range(0, end - begin, CHUNK))
    lock = threading.Lock()

    def loop() -> None:
        while True:
            with lock:
                at = next(todo, None)
            if at is None:
                return
            done, stop = at, min(at + CHUNK, end - begin)
            while done < stop:
                done += os.preadv(fd, [view[done:stop]], begin + done)

    in_threads(min(4, os.cpu_count() or 1), loop)
    os.close(fd)
    return end - begin


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print, or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gb", type=float, default=1.2, help="size of the model, in GB")
    parser.add_argument("--runs", type=int, default=5, help="runs of every case")
    parser.add_argument("--only", default="", help="only cases whose name begins like this")
    parser.add_argument("--work", type=Path, default=Path("out"), help="directory to write to")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    add_rank_options(parser)
    options = parser.parse_args(words)
    if options.rank is not None:
        _rank(options)
    with workplace(options.work) as work:
        hf = write_llama(work / "hf", gigabytes=options.gb)
        found = measure(hf, runs=options.runs, only=options.only)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(table(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
