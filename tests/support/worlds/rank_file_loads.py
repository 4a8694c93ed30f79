"""Two ranks of FSDP2 that fill a model straight from the files that more ranks wrote."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dcpconv import load_init_weights


def model() -> nn.Module:
    """What was trained."""
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 7), nn.LayerNorm(7))


def _run(rank: int, ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    with torch.device("meta"):
        made = model()
    fully_shard(made, mesh=init_device_mesh("cpu", (ranks,)))
    load_init_weights(made, directory / "actor")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(made, options=options)
    if rank == 0:
        torch.save(whole, directory / "loaded.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
