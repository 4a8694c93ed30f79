"""Four ranks that train a step under FSDP and tensor parallelism, and save a file each.

Every scene writes below its own directory, as verl does: ``model_world_size_N_rank_R.pt`` and
``optim_world_size_N_rank_R.pt``; and ``full.pt``, the whole weights and moments by name: as torch
gathers them for FSDP2, as the same step without FSDP makes them for FSDP1.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

RANKS = 4


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6), nn.Linear(6, 7), nn.BatchNorm1d(7)
    )


def _train(model: nn.Module) -> torch.optim.Optimizer:
    """A step whose gradients are the same on every rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    return optimizer


def _save(
    path: Path,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    whole: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    path.mkdir(exist_ok=True)
    rank = dist.get_rank()
    torch.save(state, path / f"model_world_size_{RANKS}_rank_{rank}.pt")
    torch.save(optimizer.state_dict(), path / f"optim_world_size_{RANKS}_rank_{rank}.pt")
    weights, moments = whole()
    if rank == 0:
        torch.save({"weights": weights, "moments": moments}, path / "full.pt")
    dist.barrier()


def _gathered(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return dict(weights), dict(
        cast("dict[str, Any]", moments.get("state", {}))
    )  # rank 0 alone has them


def _without_fsdp() -> tuple[dict[str, Any], dict[str, Any]]:
    model = _model()
    optimizer = _train(model)
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return dict(model.state_dict()), {names[p]: state for p, state in optimizer.state.items()}


def _fsdp2(shape: tuple[int, ...], names: tuple[str, ...]) -> Callable[[Path], None]:
    def scene(path: Path) -> None:
        model = _model()
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        optimizer = _train(model)
        _save(path, model.state_dict(), optimizer, lambda: _gathered(model, optimizer))

    return scene


def _fsdp_over_tp(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = _model()
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    optimizer = _train(model)
    _save(path, model.state_dict(), optimizer, lambda: _gathered(model, optimizer))


def _fsdp1(
    kind: StateDictType,
    *,
    mesh_of: Callable[[], DeviceMesh | None] = lambda: None,
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD,
    original: bool = True,
) -> Callable[[Path], None]:
    def scene(path: Path) -> None:
        model = FullyShardedDataParallel(
            _model(),
            device_mesh=mesh_of(),
            sharding_strategy=strategy,
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
            device_id=torch.device("cpu"),
            use_orig_params=original,
        )
        optimizer = _train(model)

        with FullyShardedDataParallel.state_dict_type(model, kind):
            state = model.state_dict()
        _save(path, state, optimizer, _without_fsdp)

    return scene


SCENES: dict[str, Callable[[Path], None]] = {
    "fsdp2": _fsdp2((4,), ("fsdp",)),
    "hsdp2": _fsdp2((2, 2), ("ddp", "fsdp")),
    "fsdp2-tp": _fsdp_over_tp,
    "fsdp1-mesh": _fsdp1(
        StateDictType.SHARDED_STATE_DICT, mesh_of=lambda: init_device_mesh("cpu", (4,))
    ),
    "hsdp1-mesh": _fsdp1(
        StateDictType.SHARDED_STATE_DICT,
        mesh_of=lambda: init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp")),
        strategy=ShardingStrategy.HYBRID_SHARD,
    ),
    "fsdp1-sharded": _fsdp1(StateDictType.SHARDED_STATE_DICT),
    "fsdp1-flat": _fsdp1(StateDictType.SHARDED_STATE_DICT, original=False),
    "fsdp1-local": _fsdp1(StateDictType.LOCAL_STATE_DICT),
}


def _run(rank: int, ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    try:
        for name, scene in SCENES.items():
            scene(directory / name)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
