"""How fast, and in how much memory, do two ranks save a Hugging Face directory?

    python -m bench.saving --gb 2.5 --work out

Every row is two fresh processes that hold a Llama in bf16 sharded with FSDP2, as files of the
weights would name it or as Lingua does, and save it whole: every file synced.  The clock starts
when both are ready to save and stops when both are done.  The floor is ``cp`` and ``fsync`` of the
result, in the same round; memory is each rank's ``VmHWM`` since the start above what it had then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from bench.data import write_llama
from bench.loading import RANKS
from bench.measure import copy_floor, status, workplace
from bench.models import hugging_face, lingua, torchtitan
from bench.worlds import add_rank_options, join, leave, run_world

FLOOR_TARGET = 1.3
"""Of ``cp`` and ``fsync`` of the result."""
PEER_TARGET = 0.4
"""Of the wall time of torch's own writer with consolidation."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One row; ratios are medians over rounds.

    Attributes:
        name: As printed.
        seconds: Wall time of the slower rank in the fastest run.
        to_floor: To ``cp`` and ``fsync`` of the same round: smallest, median, largest.
        to_peer: Median, to torch's own writer in the same round; 1 for that.
        peak: Largest high-water mark of a rank above its start, in MiB.
    """

    name: str
    seconds: float
    to_floor: tuple[float, float, float]
    to_peer: float
    peak: float


def rows(work: Path, *, gb: float = 2.5, rounds: int = 5) -> list[Saved]:
    """Measure every case on a model of this size, saved below ``work``."""
    hf = write_llama(work / "saving-hf", gigabytes=gb)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    floors: list[float] = []
    for _ in range(rounds):
        floors.append(copy_floor(hf, work / "saving-copy").seconds)
        shutil.rmtree(work / "saving-copy")
        for name in CASES:
            out = work / "saving-out"
            os.sync()
            spent[name].append(_world(name, out, hf))
            shutil.rmtree(out)
    shutil.rmtree(hf)
    peer = [seconds for seconds, _ in spent[PEER]]
    made = []
    for name, found in spent.items():
        seconds = [second for second, _ in found]
        ratios = [one / floor for one, floor in zip(seconds, floors, strict=True)]
        made.append(
            Saved(
                name,
                min(seconds),
                (min(ratios), statistics.median(ratios), max(ratios)),
                statistics.median(one / other for one, other in zip(seconds, peer, strict=True)),
                max(peak for _, peak in found),
            )
        )
    return made


def table(results: Sequence[Saved]) -> str:
    """Aligned rows."""
    head = f"{'case':<46} {'s':>6}  {'to cp + fsync':>18} {'target':>6} {'to torch':>8}"
    lines = [f"{head} {'target':>6} {'MiB':>6}"]
    for row in results:
        low, median, high = row.to_floor
        is_ours = row.name.startswith("save_weights")
        targets = (f"{FLOOR_TARGET:.2f}", f"{PEER_TARGET:.2f}") if is_ours else ("-", "-")
        lines.append(
            f"{row.name:<46} {row.seconds:>6.2f}  {median:>6.2f} ({low:.2f}-{high:.2f})"
            f" {targets[0]:>6} {row.to_peer:>8.2f} {targets[1]:>6} {row.peak:>6.0f}"
        )
    return "\n".join(lines)


def _world(name: str, out: Path, hf: Path) -> tuple[float, float]:
    """``(seconds, peak MiB)`` of the worse rank of one run."""
    found = run_world("bench.saving", name, ranks=RANKS, places={"out": out, "hf": hf})
    return max(one["seconds"] for one in found), max(one["peak"] for one in found)


# -- what a rank does ------------------------------------------------------------------------


def _rank(options: argparse.Namespace) -> NoReturn:
    import torch.distributed as dist  # noqa: PLC0415 - only ranks need it

    case = CASES[options.case]
    join(options, ranks=RANKS)
    from dcpconv import load_init_weights, save_weights  # noqa: F401, PLC0415 - warms up

    model = case.build(options.hf)
    load_init_weights(model, options.hf)
    case.warm()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before, started = status("VmRSS"), time.perf_counter()
    case.save(model, options)
    dist.barrier()
    seconds = time.perf_counter() - started
    leave({"seconds": seconds, "peak": status("VmHWM") - before})


def _ours(model: Any, options: argparse.Namespace, **wanted: Any) -> None:
    from dcpconv import save_weights  # noqa: PLC0415

    save_weights(model, options.out, to="hf", assets=options.hf, **wanted)


def _torchs(model: Any, options: argparse.Namespace) -> None:
    """Shards, then a second pass that puts whole tensors together; synced, as ours is."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    state = get_model_state_dict(model)
    writer = HuggingFaceStorageWriter(
        str(options.out),
        fqn_to_index_mapping=dict.fromkeys(state, 1),
        save_distributed=True,
        enable_consolidation=True,
        thread_count_consolidation=2,
    )
    save(state, storage_writer=writer)
    _sync(options)


@cache
def _of_torchtitan() -> tuple[Any, Any, Any]:
    """Its checkpoint manager, the modes of that, and the adapter of Llama 3."""
    from unittest.mock import MagicMock  # noqa: PLC0415

    # Kernels for experts on several devices, which the package imports whatever it runs on.
    sys.modules.setdefault("torchtitan.distributed.minimal_async_ep.kernels", MagicMock())
    from torchtitan.components.checkpoint import AsyncMode, CheckpointManager  # noqa: PLC0415
    from torchtitan.models.llama3.state_dict_adapter import (  # noqa: PLC0415
        Llama3StateDictAdapter,
    )

    return CheckpointManager, AsyncMode, Llama3StateDictAdapter


def _torchtitans(model: Any, options: argparse.Namespace) -> None:
    """What its checkpoint manager does for ``last_save_in_hf``: names by the adapter, then torch's
    own writer with consolidation."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: PLC0415

    manager_class, mode, adapter_class = _of_torchtitan()
    config = json.loads((options.hf / "config.json").read_text())
    attention = SimpleNamespace(
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
    numbers = SimpleNamespace(
        dim=config["hidden_size"],
        layers=[SimpleNamespace(attention=attention)],
        enable_weight_tying=True,
    )
    manager = manager_class.__new__(manager_class)  # nothing else of a trainer is there
    manager.sd_adapter = adapter_class(numbers, str(options.hf))
    state = get_model_state_dict(model)
    manager.dcp_save(state, str(options.out), mode.DISABLED, to_hf=True)
    _sync(options)


def _sync(options: argparse.Namespace) -> None:
    """As ours is."""
    if options.rank == 0:
        for path in options.out.glob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _torch_dcp(model: Any, options: argparse.Namespace) -> None:
    """What ``dcp.save`` writes by default, which somebody still has to convert."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    save({"model": get_model_state_dict(model)}, checkpoint_id=options.out)


@dataclass(frozen=True, slots=True)
class Case:
    """How a row saves.

    Attributes:
        build: The sharded model, without weights.
        save: Saves it, in every rank.
        warm: Imports what that takes.
    """

    build: Callable[[Path], Any]
    save: Callable[..., None]
    warm: Callable[[], object] = tuple


def _whole_files(model: Any, options: argparse.Namespace) -> None:
    _ours(model, options, whole_files=True)


PEER = "HuggingFaceStorageWriter, consolidated"
CASES = {
    "save_weights, HF names": Case(hugging_face, _ours),
    "save_weights, Lingua -> HF": Case(lingua, _ours),
    "save_weights, torchtitan -> HF": Case(torchtitan, _ours),
    "save_weights, whole files": Case(hugging_face, _whole_files),
    PEER: Case(hugging_face, _torchs),
    "torchtitan, last_save_in_hf": Case(torchtitan, _torchtitans, _of_torchtitan),
    "dcp.save (DCP, nothing converted)": Case(hugging_face, _torch_dcp),
}


def main() -> int:
    """Measure and print, or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gb", type=float, default=2.5, help="size of the model, in GB")
    parser.add_argument("--rounds", type=int, default=5, help="runs of every case")
    parser.add_argument("--work", type=Path, default=Path("out"), help="directory to write to")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    add_rank_options(parser)
    options = parser.parse_args()
    if options.rank is not None:
        _rank(options)
    with workplace(options.work) as work:
        sys.stdout.write(table(rows(work, gb=options.gb, rounds=options.rounds)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
