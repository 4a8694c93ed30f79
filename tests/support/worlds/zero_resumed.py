"""Two ranks of stock FSDP2 that go on with a run of ``zero_worlds`` from a DCP.

``python zero_resumed.py RANK RANKS DIRECTORY`` loads ``DIRECTORY/carried`` by ``dcp.load`` and
leaves its losses in ``DIRECTORY/losses{RANK}.json``.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from support.worlds.zero_worlds import STEPS, Model, batches, groups, loss_of


def _run(rank: int, ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    model = Model()  # of other values than the run's
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(groups(model), lr=0.5)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optim": moments}
    load(state, checkpoint_id=directory / "carried")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    losses = []
    for ids in batches(rank)[STEPS:]:
        loss = loss_of(model, ids)
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    (directory / f"losses{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
