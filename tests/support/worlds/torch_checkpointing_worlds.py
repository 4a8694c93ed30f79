"""Two ranks that save with ``torch_checkpointing`` itself: DTensors, and safetensors.

Below the directory: ``plain`` (no metadata), ``resharded`` (``metadata.pkl``), ``safetensors``, and
``full.pt`` with the whole weights and moments.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

RANKS = 2


def _gather(_self: object, data: object, process_group: Any = None) -> dict[int, object]:
    """What the package does on a GPU, whose device it names: everybody's data."""
    found: list[object] = [None] * RANKS
    dist.all_gather_object(found, data, group=process_group)
    return dict(enumerate(found))


def _run(rank: int, ranks: int, directory: Path) -> None:
    from torch_checkpointing import CheckpointManager, ItemSpec
    from torch_checkpointing.checkpoint_layout import LayoutInfo, SafetensorsSerialization
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.metadata_manager import DefaultMetadataManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    DefaultMetadataManager._all_gather_pickled_data = _gather
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    layout = LayoutInfo("model_{rank}.safetensors", SafetensorsSerialization())
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "resharded": {
            "model": ItemSpec(resharder=DefaultResharder()),
            "optimizer": ItemSpec(resharder=DefaultResharder()),
        },
        "safetensors": {"model": ItemSpec(resharder=DefaultResharder(), layout=layout)},
    }
    for name, items in kinds.items():
        config = CheckpointManager.Config.with_sync_save()
        config.items = items
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        manager = config.build()
        manager.save(str(directory / name), {"model": weights, "optimizer": moments, "step": 3})
        manager.close()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole, state = get_state_dict(model, optimizer, options=options)
    if rank == 0:
        torch.save({"weights": whole, "moments": state["state"]}, directory / "full.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
