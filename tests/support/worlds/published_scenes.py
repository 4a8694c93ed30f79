"""Scenes for ``dist_worlds``: sharded transformers models from files that spell other names.

Run as a script by ``launch``; ``prepare`` writes what the scenes read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader
from support.models.layers import randomise
from support.worlds.dist_worlds import Scene, take_part
from sweep.building import architectures, build

MODELS = ("mixtral", "llava")
"""Stacked experts; towers under other names."""

Read = Literal["all", "once", "rank0"]
READS: tuple[Read, ...] = ("all", "once", "rank0")


def prepare(directory: Path) -> None:
    """Write each model as transformers publishes it."""
    for name in MODELS:
        right(name).save_pretrained(directory / name)


def right(name: str) -> Any:
    """A model with the values that its files have."""
    (one,) = (one for one in architectures() if one.model_type == name)
    return randomise(build(one))


def on_meta(name: str) -> Any:
    """The same class without memory."""
    made = right(name)
    with torch.device("meta"):
        return type(made)(made.config).eval()


def _fsdp2(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for child in module:
                fully_shard(child)
    return fully_shard(model)


def _fsdp1(model: Any) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))


def _checkpointed(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    apply_activation_checkpointing(
        model, check_fn=lambda module: type(module).__name__.endswith(("Layer", "EncoderLayer"))
    )
    return model


WRAPS: Mapping[str, Callable[[Any], Any]] = {
    "ddp": DistributedDataParallel,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "checkpointed": _checkpointed,
}


def _shards(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return found


def _equal(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = _shards(model), _shards(expected)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


def _loads(name: str, wrap: str, read: Read) -> Scene:
    def scene(directory: Path) -> Any:
        expected = WRAPS[wrap](right(name))
        empty = right(name) if wrap in {"ddp", "fsdp1"} else on_meta(name)
        with torch.no_grad():
            for parameter in empty.parameters():
                parameter.zero_()
        model = WRAPS[wrap](empty)
        report = load_init_weights(model, directory / name, read=read)
        _equal(model, expected)
        return {"bytes": report.nbytes, "read": report.nbytes_read}

    return scene


def _by_dcp(name: str) -> Scene:
    def scene(directory: Path) -> Any:
        model = _fsdp2(right(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state = get_model_state_dict(model)
        dcp_load(state, storage_reader=CheckpointReader(directory / name, model=model))
        _equal(model, _fsdp2(right(name)))

    return scene


def _pipeline(directory: Path) -> Any:
    """Ranks that hold other layers of the same model agree on what they read."""
    rank = torch.distributed.get_rank()
    model = on_meta("mixtral")
    expected = right("mixtral")
    for one in (model, expected):
        if rank == 0:
            one.model.layers = nn.ModuleDict({"0": one.model.layers[0]})
            del one.lm_head, one.model.norm
        else:
            one.model.layers = nn.ModuleDict({"1": one.model.layers[1]})
            del one.model.embed_tokens
    load_init_weights(model, directory / "mixtral")
    _equal(model, expected)


SCENES: dict[int, dict[str, Scene]] = {
    2: {
        **{
            f"{name}/{wrap}/{read}": _loads(name, wrap, read)
            for name in MODELS
            for wrap in WRAPS
            for read in (READS if wrap == "fsdp2" else READS[:1])
        },
        **{f"{name}/dcp": _by_dcp(name) for name in MODELS},
        "pipeline": _pipeline,
    }
}

if __name__ == "__main__":
    take_part(SCENES)
