"""Process groups that save as trainings do: Lingua, accelerate, transformers, and odd tensors.

Run by ``dcp_worlds.launch``, one fresh interpreter per rank; every scene writes below the
directory of its name.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int64", "bool", "uint8")
"""Element types of the scene ``kinds``: what trainings keep, and what quantised models add."""

OBJECTS: Mapping[str, object] = {"step": 7, "name": "run", "betas": [0.9, 0.95], "none": None}
TRAIN_STEPS = 3


def kinds() -> dict[str, torch.Tensor]:
    """Tensors [7, 5] and [3, 4, 5] of every type, no two elements of a row alike."""
    found = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        found[f"{name}.rows"] = torch.arange(35).reshape(7, 5).to(dtype)
        found[f"{name}.cube"] = torch.arange(60).reshape(3, 4, 5).to(dtype)
    return found


def plain() -> dict[str, torch.Tensor]:
    """Tensors that no mesh shards: 0-d, empty, and one that is stored transposed."""
    return {
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(12),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
    }


def _local(tensor: torch.Tensor, sizes: tuple[int, ...], dims: tuple[int | None, ...]) -> DTensor:
    """This rank's part as a DTensor, without communication, so that any type will do."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", sizes)
    placements: list[Placement] = []
    part = tensor
    for dim, size, at in zip(dims, sizes, mesh.get_coordinate() or (), strict=True):
        placements.append(Replicate() if dim is None else Shard(dim))
        if dim is not None:
            chunks = part.chunk(size, dim)
            part = chunks[at] if at < len(chunks) else part.narrow(dim, 0, 0)
    return DTensor.from_local(
        part.clone(),
        mesh,
        placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def kinds_scene(sizes: tuple[int, ...], dims: tuple[int | None, ...]) -> Callable[[Path], None]:
    """Saves ``kinds()`` over a mesh of ``sizes``, mesh dim i sharding tensor dim ``dims[i]``."""

    def scene(path: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        placed = {key: _local(tensor, sizes, dims) for key, tensor in kinds().items()}
        save({"model": {**placed, **plain()}, **OBJECTS}, checkpoint_id=path)

    return scene


def _flat(path: Path) -> None:
    """Keys with dots in one flat dict, as some trainers save."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(
        {f"model.{key}": _local(tensor, (2,), (0,)) for key, tensor in kinds().items()},
        checkpoint_id=path,
    )


def _hf_model(directory: Path) -> Any:
    """The tiny model of this directory, the same in the test and in every rank."""
    from torch.distributed.fsdp import fully_shard

    from support.models.hf_models import save_hf, tiny

    model = tiny("llama")
    if torch.distributed.get_rank() == 0:
        save_hf(model, directory / "hf")
    torch.distributed.barrier()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def _accelerate(path: Path) -> None:
    """What ``Trainer`` and ``accelerate`` leave under FSDP with a sharded state dict."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model

    model = _hf_model(path)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = Accelerator(cpu=True)
    save_fsdp_model(plugin, accelerator, model, str(path / "checkpoint-3"))


def _transformers(path: Path) -> None:
    """Local slices under full names, by the writer that ``save_pretrained`` uses for it.

    Source: transformers 5.23 ``distributed/``, ``save_pretrained(distributed_checkpoint=True)``.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model = _hf_model(path)
    writer = HuggingFaceStorageWriter(str(path / "saved"), save_distributed=True)
    save(get_model_state_dict(model), storage_writer=writer)
    writer = HuggingFaceStorageWriter(str(path / "numbers"), save_distributed=True)
    rows = {key: _local(tensor, (2,), (0,)) for key, tensor in kinds().items()}
    whole = {key: tensor.contiguous() for key, tensor in plain().items()}
    save({**rows, **whole}, storage_writer=writer)
    if torch.distributed.get_rank() == 0:
        model.config.save_pretrained(path / "saved")


def _lingua(path: Path) -> None:
    """The example trainer: stock load of the converted weights, some steps, its logits, a save.

    ``path/init`` was converted by the test.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    import lingua_style_trainer as trainer

    args = argparse.Namespace(
        steps=TRAIN_STEPS,
        batch=2,
        seq_len=32,
        save=path / "0000000003",
        params=path / "init/params.json",
        save_hf=None,
    )
    model = trainer.build(args.params, seq_len=args.seq_len)
    model.to_empty(device="cpu")
    model.init_weights()
    state = {"model": get_model_state_dict(model)}
    load(state, checkpoint_id=path / "init")
    set_model_state_dict(model, state["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    trainer.train(model, optimizer, args)
    trainer.save(model, optimizer, args)
    tokens = trainer.fixed_batch(model.params.vocab_size, seq_len=args.seq_len)
    with torch.no_grad():
        logits = model(tokens)
    if torch.distributed.get_rank() == 0:
        torch.save({"tokens": tokens, "logits": logits}, path / "logits.pt")
        (args.save / "train_state_00000.json").write_text('{"step": 3, "acc_step": 0}')


_SCENES: dict[str, Callable[[Path], None]] = {
    "rows": kinds_scene((2,), (0,)),
    "columns": kinds_scene((2,), (1,)),
    "replicated": kinds_scene((2,), (None,)),
    "flat": _flat,
    "accelerate": _accelerate,
    "transformers": _transformers,
    "lingua": _lingua,
}
"""For two ranks."""


def _run(rank: int, ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    try:
        for name, scene in _SCENES.items():
            if rank == 0:
                (directory / name).mkdir(exist_ok=True)
            torch.distributed.barrier()
            scene(directory / name)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
