"""Ranks that train with DeepSpeed on gloo and leave its checkpoints.

``python zero_worlds.py RANK RANKS DIRECTORY`` is one rank of one world; it trains the same small
model under every scene of ``SCENES`` and saves each into a directory of its own.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from support.worlds.ranks import run_ranks

STEPS = 3
AFTER = 10
"""Steps that each rank takes before and after it saves."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is trained, and how.

    Attributes:
        stage: ZeRO stage.
        bf16: Train in bf16 with fp32 masters.
        frozen: Keep one layer out of the optimizer.
        config: What else the DeepSpeed config says.
    """

    stage: int
    bf16: bool = True
    frozen: bool = False
    config: tuple[tuple[str, Any], ...] = ()


SCENES = {
    "zero1": Scene(1, bf16=False),
    "zero1-bf16": Scene(1, frozen=True),
    "zero2": Scene(2, frozen=True),
    "zero2-fp32": Scene(2, bf16=False, config=(("round_robin_gradients", True),)),
    "zero3": Scene(3, frozen=True),
    "zero3-groups": Scene(3, bf16=False, config=(("sub_group_size", 60),)),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 13)
        self.down = nn.Linear(13, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("calls", torch.tensor([3.0, 4.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.norm(self.down(torch.tanh(self.up(x))))
        return out


class Model(nn.Module):
    """A tied head, a buffer, odd sizes: no tensor divides evenly among the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.layers = nn.ModuleList([Block(5), Block(5)])
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    is_matrix = {id(p): getattr(p, "ds_shape", p.shape).numel() > 13 for p in trained}
    return [
        {"params": [p for p in trained if is_matrix[id(p)]], "weight_decay": 0.1},
        {"params": [p for p in trained if not is_matrix[id(p)]], "weight_decay": 0.0},
    ]


def train(scene: Scene, directory: Path) -> None:
    """Train a few steps and save."""
    import deepspeed

    torch.manual_seed(7)
    model = Model()
    if scene.frozen:
        model.layers[1].up.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": scene.stage, **dict(scene.config)},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": scene.bf16},
    }
    if scene.stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for number, ids in enumerate(batches(dist.get_rank())):
        if number == STEPS:
            engine.save_checkpoint(str(directory), tag=f"global_step{STEPS}")
        loss = loss_of(engine, ids)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    (directory / f"losses{dist.get_rank()}.json").write_text(json.dumps(losses[STEPS:]))


def batches(rank: int) -> list[torch.Tensor]:
    """What a rank sees, step by step."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(0, 11, (2, 4), generator=generator) for _ in range(STEPS + AFTER)]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """A token has to predict itself."""
    return nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())


def write_worlds(directory: Path, *, ranks: int) -> None:
    """Every scene, trained by so many processes, in a subdirectory of its name."""
    run_ranks(__file__, ranks, directory, timeout_s=300)


def _main(rank: int, ranks: int, directory: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "DS_ACCELERATOR": "cpu",
    }
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=ranks
    )
    import deepspeed

    deepspeed.init_distributed("gloo")
    for name, scene in SCENES.items():
        train(scene, directory / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # Threads of DeepSpeed's own may still run, and end an interpreter that is about to end.
    sys.stdout.flush()
    os._exit(0)
