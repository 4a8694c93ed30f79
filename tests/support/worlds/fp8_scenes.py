"""Scenes for ``dist_worlds``: fp8 weights into shards that cut through their blocks.

Run as a script by ``launch``; ``prepare`` writes what the scenes read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.fsdp import fully_shard

from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.sharded_models import (
    Wrap,
    build,
    ddp,
    fsdp1,
    fsdp2,
    lingua_weights,
    local_tensors,
    tp,
)

Read = Literal["all", "once", "rank0"]
READS: tuple[Read, ...] = ("all", "once", "rank0")
WRAPS: dict[str, Wrap] = {
    "ddp": ddp,
    "fsdp1-flat": fsdp1(original=False),
    "fsdp2": fsdp2(),
    "tp": tp(),
}
"""Replicas, intervals, rows and columns; all but the first cut through blocks of 24 by 40."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(directory: Path) -> None:
    """Write an fp8 Llama, an fp8 DeepSeek-V3 and gpt-oss, and what their tensors are worth."""
    from support.checkpoints import gpt_oss
    from support.checkpoints.scaled_blocks import published

    for model_type, options in (("llama", {"tie_word_embeddings": False}), ("deepseek_v3", {})):
        (directory / model_type).mkdir()
        _, worth = published(directory / model_type, model_type, **options)
        torch.save(worth, directory / model_type / "worth.pt")
    _, worth = gpt_oss.published(directory / "gpt_oss/in")
    torch.save(worth, directory / "gpt_oss/worth.pt")


def _right(directory: Path, dtype: torch.dtype) -> nn.Module:
    """Lingua's model with what the Llama's tensors are worth, rounded once."""
    model = build(meta=False, dtype=dtype)
    weights = lingua_weights(torch.load(directory / "llama/worth.pt"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.rope_embeddings.reset_parameters()
    return model


def _equal(model: nn.Module, right: nn.Module) -> None:
    found, expected = local_tensors(model), local_tensors(right)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype is tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def _relabelled(wrap: Wrap, dtype: torch.dtype, read: Read) -> Scene:
    def scene(directory: Path) -> Any:
        model = wrap(build(meta=False, dtype=dtype))
        report = load_init_weights(model, directory / "llama/fp8", dequantize=True, read=read)
        _equal(model, wrap(_right(directory, dtype)))
        return {"bytes": report.nbytes, "read": report.nbytes_read}

    return scene


def _stacked(read: Read) -> Scene:
    """DeepSeek-V3 as transformers has it, its stacked experts in two halves."""

    def scene(directory: Path) -> Any:
        from support.models.hf_models import tiny

        model = _sharded(tiny("deepseek_v3"), meta=True)
        load_init_weights(model, directory / "deepseek_v3/fp8", dequantize=True, read=read)
        right = _sharded(tiny("deepseek_v3"), meta=False)
        plain = directory / "deepseek_v3/worth.pt"
        load_init_weights(right, plain, assets=directory / "deepseek_v3/fp8")
        _equal(model, right)

    return scene


def _halves(read: Read, dtype: torch.dtype) -> Scene:
    """gpt-oss from MXFP4, its experts in two halves."""

    def scene(directory: Path) -> Any:
        from support.checkpoints.gpt_oss import model as tiny_gpt_oss

        model = _sharded(tiny_gpt_oss().to(dtype), meta=False)
        report = load_init_weights(model, directory / "gpt_oss/in", dequantize=True, read=read)
        right = tiny_gpt_oss().to(dtype)
        for name, buffer in right.named_buffers():  # computed again in fp32, not from rounded ones
            buffer.copy_(model.get_buffer(name))
        right.load_state_dict(torch.load(directory / "gpt_oss/worth.pt"))
        _equal(model, _sharded(right, meta=False))
        return {"bytes": report.nbytes, "read": report.nbytes_read}

    return scene


def _halves_by_dcp(directory: Path) -> Any:
    """The same through torch's own loading, a part of the model alone."""
    from support.checkpoints.gpt_oss import model as tiny_gpt_oss

    model = _sharded(tiny_gpt_oss(), meta=False)
    right = tiny_gpt_oss()
    right.load_state_dict(torch.load(directory / "gpt_oss/worth.pt"))
    expected: dict[str, Any] = get_model_state_dict(_sharded(right, meta=False))
    state: dict[str, Any] = {
        key: one for key, one in get_model_state_dict(model).items() if "layers.1" in key
    }
    dcp_load(state, storage_reader=CheckpointReader(directory / "gpt_oss/in", dequantize=True))
    for key, tensor in state.items():
        assert torch.equal(tensor.to_local(), expected[key].to_local()), key


def _sharded(like: Any, *, meta: bool) -> nn.Module:
    model: Any = like
    if meta:
        with torch.device("meta"):
            model = type(like)(like.config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    made: nn.Module = model
    return made


def _by_dcp(dtype: torch.dtype) -> Scene:
    def scene(directory: Path) -> Any:
        model = fsdp2()(build(meta=False, dtype=dtype))
        state = get_model_state_dict(model)
        reader = CheckpointReader(directory / "llama/fp8", to="lingua", dequantize=True)
        dcp_load(state, storage_reader=reader)
        set_model_state_dict(model, state)
        model.get_submodule("rope_embeddings").reset_parameters()  # type: ignore[operator]
        _equal(model, fsdp2()(_right(directory, dtype)))

    return scene


def _without_factors(read: Read) -> Scene:
    def scene(directory: Path) -> Any:
        model = fsdp2()(build(meta=True, dtype=torch.bfloat16))
        load_init_weights(model, directory / "llama/fp8", strict=False, read=read)

    return scene


SCENES: dict[int, dict[str, Scene]] = {
    2: {
        **{
            f"lingua/{name}/{label}/{read}": _relabelled(wrap, dtype, read)
            for name, wrap in WRAPS.items()
            for label, dtype in DTYPES.items()
            for read in READS
        },
        **{f"deepseek/{read}": _stacked(read) for read in READS},
        **{
            f"gpt-oss/{label}/{read}": _halves(read, dtype)
            for label, dtype in DTYPES.items()
            for read in READS
        },
        "gpt-oss/dcp": _halves_by_dcp,
        **{f"dcp/{label}": _by_dcp(dtype) for label, dtype in DTYPES.items()},
        **{f"refused/{read}": _without_factors(read) for read in READS},
    }
}

if __name__ == "__main__":
    take_part(SCENES)
