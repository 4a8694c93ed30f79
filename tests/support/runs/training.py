"""Real training: MiniMind's way on one process, and stock FSDP2 with DCP on two.

``launch`` starts one fresh interpreter per rank, which runs this file.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from support.models.minimind import GenerationName, MiniMind, MiniMindConfig
from support.worlds.ranks import run_ranks

BATCH, SEQ = 4, 16
STEPS = 40
"""Of the whole cosine schedule."""


def batch(step: int, vocab_size: int) -> Tensor:
    """Token ids [batch, seq + 1] of one step, the same whoever asks; a token decides the next."""
    successor = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1000 + step)
    columns = [torch.randint(0, vocab_size, (BATCH,), generator=generator)]
    for _ in range(SEQ):
        columns.append(successor[columns[-1]])
    return torch.stack(columns, 1)


@dataclass
class MiniMindRun:
    """Model, AdamW, scaler and cosine schedule, saved and loaded as MiniMind's trainers do.

    Source: jingyaogong/minimind@d65ef2c ``trainer/trainer_utils.py`` (``lm_checkpoint``),
    ``trainer/train_grpo.py`` (a scheduler's state in the file).
    """

    model: MiniMind
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    scheduler: CosineAnnealingLR
    step: int = 0

    @classmethod
    def begin(cls, generation: GenerationName, **sizes: Any) -> MiniMindRun:
        torch.manual_seed(0)
        model = MiniMind(MiniMindConfig(generation=generation, **sizes))
        for parameter in model.parameters():  # the fresh embedding is that of a head: N(0, 1)
            parameter.data.mul_(0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return cls(model, optimizer, scaler, CosineAnnealingLR(optimizer, STEPS, 1e-3))

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            self.step += 1
            tokens = batch(self.step, self.model.config.vocab_size)
            logits = self.model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            torch.autograd.backward(self.scaler.scale(loss))
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    def save(self, path: Path, *, half: bool = True, **more: object) -> None:
        state = self.model.state_dict()
        torch.save(
            {
                "model": {key: value.half() if half else value for key, value in state.items()},
                "optimizer": self.optimizer.state_dict(),
                "epoch": 0,
                "step": self.step,
                "world_size": 1,
                "wandb_id": None,
                "scaler": self.scaler.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                **more,
            },
            path,
        )

    def load(self, path: Path) -> None:
        found = torch.load(path, map_location="cpu")
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.scaler.load_state_dict(found["scaler"])
        self.scheduler.load_state_dict(found["scheduler"])
        self.step = found["step"]


def launch(directory: Path, *, ranks: int, timeout_s: float = 120) -> dict[str, Any]:
    """Run this file once per rank with ``directory/job.json``; what rank 0 answers.

    Raises:
        AssertionError: A rank failed or did not end; shows what it printed.
    """
    run_ranks(__file__, ranks, directory, timeout_s=timeout_s)
    answer: dict[str, Any] = json.loads((directory / "answer.json").read_text())
    return answer


def _go_on(rank: int, ranks: int, directory: Path) -> None:
    """Resume a DCP with stock calls on a sharded model, train on, and save it with stock calls."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import (
        get_state_dict,
        set_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    job = json.loads((directory / "job.json").read_text())
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    run = MiniMindRun.begin(job["generation"])
    model = run.model
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.get_submodule(job["layers"]).children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, STEPS, 1e-3)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {
        "model": weights,
        "optim": moments,
        "step": 0,
        "epoch": -1,
        "world_size": 0,
        "scaler": run.scaler.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    load(state, checkpoint_id=job["source"])
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    run.scaler.load_state_dict(state["scaler"])
    scheduler.load_state_dict(state["scheduler"])
    scale = run.scaler.get_scale()
    losses = []
    for step in range(state["step"] + 1, state["step"] + 1 + job["steps"]):
        tokens = batch(step, model.config.vocab_size).chunk(ranks)[rank]
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss * scale)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / scale)  # a power of two: exact
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
    weights, moments = get_state_dict(model, optimizer)
    end = {"step": state["step"] + job["steps"], "epoch": state["epoch"], "world_size": ranks}
    more = {"scaler": run.scaler.state_dict(), "scheduler": scheduler.state_dict()}
    save({"model": weights, "optim": moments, **end, **more}, checkpoint_id=job["target"])
    if rank == 0:
        assert all(map(math.isfinite, losses))
        answer = {"losses": losses, "epoch": state["epoch"], "world_size": state["world_size"]}
        (directory / "answer.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    _go_on(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
