"""Runs that DeepSpeed itself leaves: ``launch`` trains on gloo, one directory per ZeRO stage."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from support.worlds.ranks import run_ranks

STAGES = (0, 1, 2, 3)
STEPS = (1, 2)


def launch(directory: Path, ranks: int) -> None:
    """Every stage saves after every step, into ``directory/N``."""
    run_ranks(__file__, ranks, directory, timeout_s=240)


def main(rank: int, ranks: int, directory: Path) -> None:
    """One rank of the world."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    dist.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=ranks)
    for stage in STAGES:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters()),
            config=config,
            dist_init_required=False,
        )
        for _ in STEPS:
            engine.backward(engine(torch.ones(1, 5)).sum())
            engine.step()
            engine.save_checkpoint(str(directory / str(stage)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
