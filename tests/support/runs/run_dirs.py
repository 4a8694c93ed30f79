"""Step directories as their trainers leave them, with files of a few bytes."""

from __future__ import annotations

import functools
import io
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save

METADATA = pickle.dumps(["optim.state.norm.weight.exp_avg", "__0_0.distcp", "__1_0.distcp"])
"""What a listing looks for in a ``.metadata`` of two ranks; a pickle, but of no DCP."""


@functools.cache
def saved(value: float = 1.0) -> bytes:
    """A file of ``torch.save``."""
    stream = io.BytesIO()
    torch.save({"w": torch.full((3,), value)}, stream)
    return stream.getvalue()


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
    model: Files = {f"pytorch_model_fsdp_0/__{rank}_0.distcp": b"d" for rank in range(2)}
    optim: Files = {f"optimizer_0/__{rank}_0.distcp": b"d" for rank in range(2)}
    rng: Files = {f"rng_state_{rank}.pth": saved() for rank in range(2)}
    metadata: Files = {
        "pytorch_model_fsdp_0/.metadata": METADATA,
        "optimizer_0/.metadata": METADATA,
    }
    state: Files = {"scheduler.pt": saved(), "trainer_state.json": trainer_state(step)}
    return write(run / f"checkpoint-{step}", model | optim | rng | metadata | state)


def lingua(run: Path, step: int) -> Path:
    shards: Files = {f"__{rank}_0.distcp": b"d" for rank in range(2)}
    states: Files = {f"train_state_{rank:05d}.json": '{"step": 1}' for rank in range(2)}
    params = json.dumps({"distributed": {"dp_shard": 2, "dp_replicate": 1, "tp_size": 1}})
    files = shards | states | {".metadata": METADATA, "params.json": params}
    return write(run / f"{step:010d}", files)


def torchtitan(run: Path, step: int) -> Path:
    shards: Files = {f"__{rank}_0.distcp": b"d" for rank in range(2)}
    keys = [*pickle.loads(METADATA), "lr_scheduler.last_epoch", "train_state.step"]
    shards[".metadata"] = pickle.dumps(keys)
    return write(run / f"step-{step}", shards)


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
