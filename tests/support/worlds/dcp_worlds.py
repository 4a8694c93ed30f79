"""Process groups on one machine that save and load DCP directories with the real torch.

``launch`` starts one fresh interpreter per rank, which runs this file; ranks meet at a file, so no
port can be taken.  One world writes several checkpoints, because starting torch costs more than
saving.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from support.worlds.ranks import run_ranks
from support.worlds.wild_worlds import kinds_scene

SHAPES = {
    "even.weight": (8, 6),
    "odd.weight": (7, 5),
    "single.weight": (1, 3),
    "bias": (5,),
    "cube": (5, 3, 2),
}
"""Rows that 2 and 4 ranks share evenly, unevenly, and not at all."""


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The same on every rank and in the test, no two elements alike."""
    found, start = {}, 1
    for key, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        found[key] = torch.arange(start, start + numel, dtype=dtype).reshape(shape)
        start += numel
    return found


def launch(ranks: int, directory: Path, *, script: str = __file__, timeout_s: float = 120) -> None:
    """Run ``script`` once per rank; what they write is below ``directory``.

    Raises:
        AssertionError: A rank failed or did not end; shows what it printed.
    """
    run_ranks(script, ranks, directory, timeout_s=timeout_s)


def _model() -> nn.Module:
    model = nn.Module()
    for key, tensor in weights().items():
        module, parent = key.rpartition(".")[0], model
        if module:
            parent = nn.Module()
            model.add_module(module, parent)
        parent.register_parameter(key.rpartition(".")[2], nn.Parameter(tensor.clone()))
    return model


def _run(rank: int, ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    try:
        for name, scene in _SCENES[ranks].items():
            scene(directory / name)
    finally:
        torch.distributed.destroy_process_group()


def _save(path: Path, model: Mapping[str, object]) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": model, "step": 3}, checkpoint_id=path)


def _fsdp(mesh_sizes: tuple[int, ...]) -> Callable[[Path], None]:
    def scene(path: Path) -> None:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        names = ("replicate", "shard")[-len(mesh_sizes) :]
        mesh = init_device_mesh("cpu", mesh_sizes, mesh_dim_names=names)
        model = _model()
        fully_shard(model, mesh=mesh)
        _save(path, get_model_state_dict(model))

    return scene


def _placed(mesh_sizes: tuple[int, ...], dims: Iterable[int | None]) -> Callable[[Path], None]:
    """Tensors placed by hand; dim ``None`` is replicated, one that a tensor lacks is its last."""
    placed_dims = tuple(dims)

    def scene(path: Path) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", mesh_sizes)
        _save(
            path,
            {
                key: distribute_tensor(
                    tensor,
                    mesh,
                    [
                        Replicate() if dim is None else Shard(min(dim, tensor.dim() - 1))
                        for dim in placed_dims
                    ],
                )
                for key, tensor in weights(torch.bfloat16).items()
            },
        )

    return scene


def _fsdp_over_tp(path: Path) -> None:
    """FSDP2 shards the rows of what tensor parallelism has sharded by rows or columns."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) + number)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    _save(path, get_model_state_dict(model))


def _load_ours(path: Path) -> None:
    """Stock ``dcp.load`` of a directory that we wrote into a model sharded by FSDP2."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = _model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fully_shard(model)
    state = {"model": get_model_state_dict(model)}
    load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    for key, tensor in get_model_state_dict(model).items():
        assert isinstance(tensor, DTensor), key
        assert torch.equal(tensor.full_tensor(), weights()[key]), key


_SCENES: dict[int, dict[str, Callable[[Path], None]]] = {
    2: {
        "fsdp": _fsdp((2,)),
        "columns": _placed((2,), [1]),
        "replicated": _placed((2,), [None]),
        "ours": _load_ours,
        "ours-chunked": _load_ours,
    },
    4: {
        "fsdp": _fsdp((4,)),
        "hsdp": _fsdp((2, 2)),
        "rows-and-columns": _placed((2, 2), [0, 1]),
        "columns-replicated": _placed((2, 2), [None, 1]),
        "fsdp-over-tp": _fsdp_over_tp,
        "kinds": kinds_scene((2, 2), (0, 1)),
        "kinds-on-rows": kinds_scene((2, 2), (0, 0)),
    },
}


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
