"""Step directories as their trainers leave them, with files of a few bytes."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save


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
        writer = dcp.FileSystemWriter(name, thread_count=2, sync_files=False)
        dcp.save(state, storage_writer=writer, no_dist=True)
        files = {path.name: path.read_bytes() for path in Path(name).iterdir()}
    renamed = {"__0_1.distcp": "__1_0.distcp"}
    metadata = files[".metadata"].replace(b"__0_1.distcp", b"__1_0.distcp")
    return {renamed.get(name, name): data for name, data in files.items()} | {".metadata": metadata}


def inside(directory: str, files: Mapping[str, bytes]) -> Files:
    """These files with a directory in front of their names."""
    return {f"{directory}/{name}": data for name, data in files.items()}


def safetensors(**tensors: torch.Tensor) -> bytes:
    """A file of safetensors."""
    return save(tensors or {"w": torch.ones(3)})


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


MAKERS: Mapping[str, Callable[[Path, int], Path]] = {
    "hf-trainer": hf_trainer,
    "hf-fsdp": hf_fsdp,
    "lingua": lingua,
    "torchtitan": torchtitan,
    "accelerate": accelerate,
}
"""Every layout whose steps are directories."""
