"""One ``torch.save`` file per rank, as FSDP trainers write them, without starting processes."""

from __future__ import annotations

import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from support.versions import placed

Split = Callable[[DeviceMesh], Mapping[str, object]]


def each_rank(shape: Sequence[int], names: Sequence[str]) -> Iterator[tuple[int, DeviceMesh]]:
    """Every rank of a mesh whose processes are on paper only."""
    hook = sys.excepthook
    for rank in range(math.prod(shape)):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(shape))
        try:
            yield rank, init_device_mesh("cpu", tuple(shape), mesh_dim_names=tuple(names))
        finally:
            dist.destroy_process_group()
            sys.excepthook = hook


def distributed(tensors: Mapping[str, Tensor], placements: Sequence[Placement]) -> Split:
    """Every tensor placed alike."""

    def split(mesh: DeviceMesh) -> dict[str, object]:
        return {key: placed(tensor.clone(), mesh, placements) for key, tensor in tensors.items()}

    return split


def as_of_torch_2_6(mesh: DeviceMesh) -> None:
    """Makes a mesh pickle as that version does: no rank, and for its groups tags and members."""
    state: dict[str, Any] = vars(mesh)
    place = list(mesh.get_coordinate() or ())
    rank = state.pop("_rank", None)
    state.pop("_dim_group_names", None)
    state["_coordinate_on_dim"] = place
    state["_dim_group_infos"] = [
        (f"ptd:{axis}", [int(rank or 0), 7 * axis], f"group{axis}{rank}")
        for axis in range(len(place))
    ]


def save_verl(
    directory: Path,
    split: Split,
    *,
    shape: Sequence[int] = (2,),
    names: Sequence[str] = ("fsdp",),
    config: Mapping[str, object] | None = None,
) -> Path:
    """The directory of an actor: model, optimizer and the rest of every rank."""
    directory.mkdir(parents=True, exist_ok=True)
    world = math.prod(shape)
    for rank, mesh in each_rank(shape, names):
        state = OrderedDict(split(mesh))
        torch.save(state, directory / f"model_world_size_{world}_rank_{rank}.pt")
        optimizer = {"state": {}, "param_groups": [{"lr": 1e-6, "params": list(state)}]}
        torch.save(optimizer, directory / f"optim_world_size_{world}_rank_{rank}.pt")
        extra = {"lr_scheduler": {"last_epoch": 1}, "rng": {"cpu": torch.zeros(16).byte()}}
        torch.save(extra, directory / f"extra_state_world_size_{world}_rank_{rank}.pt")
    (directory / "fsdp_config.json").write_text(json.dumps({"world_size": world}))
    if config is not None:
        (directory / "huggingface").mkdir(exist_ok=True)
        (directory / "huggingface" / "config.json").write_text(json.dumps(config))
    return directory
