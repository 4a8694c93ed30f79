"""Step directories as their trainers leave them, with files of a few bytes."""

from __future__ import annotations

import functools
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors.torch import save
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from support.checkpoints.zero_files import Run, write_zero


@functools.cache
def saved(value: float = 1.0) -> bytes:
    """A file of ``torch.save``."""
    stream = io.BytesIO()
    torch.save({"w": torch.full((3,), value)}, stream)
    return stream.getvalue()


@functools.cache
def dcp_files() -> Mapping[str, bytes]:
    """A DCP directory of two ranks: what one rank writes with two threads, under other names."""
    state = {
        "model": {"w": torch.ones(3), "b": torch.ones(2)},
        "optim": {"state.w.exp_avg": torch.ones(3)},
        "lr_scheduler": {"last_epoch": torch.tensor(1)},
        "train_state": {"step": torch.tensor(1)},
    }
    with tempfile.TemporaryDirectory() as name:
        writer = FileSystemWriter(name, thread_count=2, sync_files=False)
        save_dcp(state, storage_writer=writer)
        files = {path.name: path.read_bytes() for path in Path(name).iterdir()}
    renamed = {"__0_1.distcp": "__1_0.distcp"}
    metadata = files[".metadata"].replace(b"__0_1.distcp", b"__1_0.distcp")
    return {renamed.get(name, name): data for name, data in files.items()} | {".metadata": metadata}


def inside(directory: str, files: Mapping[str, bytes]) -> Files:
    """These files with a directory in front of their names."""
    return {f"{directory}/{name}": data for name, data in files.items()}


def safetensors(**tensors: torch.Tensor) -> bytes:
    """A file of safetensors."""
    data: bytes = save(tensors or {"w": torch.ones(3)})
    return data


Files = dict[str, bytes | str]


def write(directory: Path, files: Files) -> Path:
    """Create these files, and the directories they need."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


def trainer_state(step: int, metrics: Mapping[str, float] | None = None) -> str:
    history = [{"step": step, "epoch": 1.0, **(metrics or {})}]
    return json.dumps({"global_step": step, "log_history": history}, indent=2) + "\n"


def hf_trainer(run: Path, step: int, metrics: Mapping[str, float] | None = None) -> Path:
    files: Files = {name: saved() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")}
    files["model.safetensors"] = safetensors()
    state: Files = {"trainer_state.json": trainer_state(step, metrics)}
    return write(run / f"checkpoint-{step}", files | state)


def hf_fsdp(run: Path, step: int) -> Path:
    model = inside("pytorch_model_fsdp_0", dcp_files())
    optim = inside("optimizer_0", dcp_files())
    rng: Files = {f"rng_state_{rank}.pth": saved() for rank in range(2)}
    state: Files = {"scheduler.pt": saved(), "trainer_state.json": trainer_state(step)}
    return write(run / f"checkpoint-{step}", model | optim | rng | state)


def hf_fsdp_ranks(run: Path, step: int) -> Path:
    """What Trainer leaves where accelerate writes a file per rank."""
    files: Files = {"scheduler.pt": saved(), "trainer_state.json": trainer_state(step)}
    for rank in range(2):
        files[f"pytorch_model_fsdp_rank{rank}.bin"] = saved()
        files[f"optimizer_0_rank{rank}.bin"] = saved()
        files[f"rng_state_{rank}.pth"] = saved()
    return write(run / f"checkpoint-{step}", files)


def lingua(run: Path, step: int) -> Path:
    states: Files = {f"train_state_{rank:05d}.json": '{"step": 1}' for rank in range(2)}
    params = json.dumps({"distributed": {"dp_shard": 2, "dp_replicate": 1, "tp_size": 1}})
    files: Files = {**dcp_files(), **states, "params.json": params}
    return write(run / f"{step:010d}", files)


def torchtitan(run: Path, step: int) -> Path:
    return write(run / f"step-{step}", {**dcp_files()})


def accelerate(run: Path, step: int) -> Path:
    files: Files = {"optimizer.bin": saved(), "scheduler.bin": saved()}
    files["model.safetensors"] = safetensors()
    rng: Files = {f"random_states_{rank}.pkl": saved() for rank in range(2)}
    return write(run / f"checkpoint_{step}", files | rng)


def minimind(run: Path, step: int, *, name: str = "pretrain_96", epoch: int = 0) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    path = run / f"{name}_resume.pth"
    state = {"model": {"w": torch.ones(3)}, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(
        state | {"epoch": epoch, "step": step, "world_size": 1, "scaler": {"scale": 1.0}}, path
    )
    return path


Maker = Callable[..., Path]

MAKERS: Mapping[str, Maker] = {
    "hf-trainer": hf_trainer,
    "hf-fsdp": hf_fsdp,
    "hf-fsdp of ranks": hf_fsdp_ranks,
    "lingua": lingua,
    "torchtitan": torchtitan,
    "accelerate": accelerate,
}
"""Every layout whose steps are directories."""


def zero(run: Path, step: int, *, stage: int = 2, ranks: int = 2) -> Path:
    """A tag directory of DeepSpeed with ``latest`` beside it, as ``engine.save_checkpoint`` does.

    Source: DeepSpeed 0.19 ``runtime/engine.py``.
    """
    return write(run, dict(_zero_files(step, stage, ranks))) / f"global_step{step}"


@functools.cache
def _zero_files(step: int, stage: int, ranks: int) -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        weights = {"w": torch.ones(3), "b": torch.ones(2)}
        write_zero(Path(name), Run(groups=[weights], ranks=ranks, stage=stage, step=step))
        return {
            path.relative_to(name).as_posix(): path.read_bytes()
            for path in Path(name).rglob("*")
            if path.is_file()
        }


def hf_zero(run: Path, step: int, *, stage: int = 2, ranks: int = 2) -> Path:
    """A step of Trainer under DeepSpeed; under stage 3 the weights are nowhere else."""
    path = run / f"checkpoint-{step}"
    zero(path, step, stage=stage, ranks=ranks)
    files: Files = {f"rng_state_{rank}.pth": saved() for rank in range(ranks)}
    if stage < 3:
        files["model.safetensors"] = safetensors()
    files |= {"scheduler.pt": saved(), "trainer_state.json": trainer_state(step)}
    return write(path, files)


def verl(run: Path, step: int, *, ranks: int = 2, roles: tuple[str, ...] = ("actor",)) -> Path:
    """A step of verl's FSDP trainer, and the file that names it.

    Source: volcengine/verl@58ee12f ``utils/checkpoint/checkpoint_manager.py``.
    """
    files: Files = {"data.pt": saved()}
    for role in roles:
        for kind in ("model", "optim", "extra_state"):
            for rank in range(ranks):
                files[f"{role}/{kind}_world_size_{ranks}_rank_{rank}.pt"] = saved()
        files[f"{role}/huggingface/config.json"] = "{}"
    write(run, {"latest_checkpointed_iteration.txt": str(step)})
    return write(run / f"global_step_{step}", files)


WITH_TRACKERS: Mapping[str, Maker] = {"deepspeed": zero, "verl": verl}
"""Layouts whose newest step is named in a file of the run; make the steps in their order."""


def example(run: Path) -> None:
    """The run that docs/runs.md shows: four steps, the newest of which was interrupted."""
    begun = datetime(2026, 3, 1, 10, tzinfo=timezone.utc).timestamp()
    for number, loss in enumerate((2.9, 2.4, 2.6, 2.7)):
        step = 100 * (number + 1)
        path = hf_trainer(run, step, {"eval_loss": loss})
        if step == 400:
            optimizer = path / "optimizer.pt"
            optimizer.write_bytes(optimizer.read_bytes()[:700])
        for file in path.iterdir():
            os.utime(file, (begun + 1200 * number,) * 2)
