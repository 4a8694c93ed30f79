"""Scenes for ``dist_worlds`` on one GPU: a process group that sends from the GPU only.

Run as a script by ``launch``; ``prepare`` of ``load_scenes`` writes what the scenes read, and
``prepare`` here a checkpoint that is large beside staging buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.fsdp import fully_shard

from dcpconv import CheckpointReader, load_init_weights, save_weights
from dcpconv.loading import reading
from dcpconv.loading.staging import Cuda
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.load_scenes import prepare as prepare_weights
from support.worlds.sharded_models import (
    build,
    expected,
    fsdp2,
    local_parameters,
    plain,
)

ROWS, COLUMNS, TENSORS = 4096, 2048, 6
"""Of the large checkpoint, in fp32: 192 MiB."""
MIB = 1 << 20


def prepare(directory: Path) -> None:
    """Everything that scenes read."""
    prepare_weights(directory, ())
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{index}.weight": torch.randn(ROWS, COLUMNS, generator=generator)
        for index in range(TENSORS)
    }
    (directory / "large").mkdir()
    save_file(tensors, directory / "large/model.safetensors")
    torch.save(tensors, directory / "large.pt")


def large(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the large checkpoint, without memory."""
    model = nn.Module()
    layers = nn.ModuleList(
        nn.Linear(COLUMNS, ROWS, bias=False, device="meta", dtype=dtype) for _ in range(TENSORS)
    )
    model.add_module("layers", layers)
    return model


def _equal(model: nn.Module, right: dict[str, Tensor]) -> None:
    found = local_parameters(model)
    assert set(found) == set(right)
    for key, tensor in right.items():
        assert found[key].is_cuda, key
        assert torch.equal(found[key].cpu(), tensor.cpu()), key


def _loads(*, is_sharded: bool, engine: Any) -> Scene:
    def scene(directory: Path) -> Any:
        wrap = fsdp2() if is_sharded else plain
        model = wrap(build(meta=True))
        report = load_init_weights(model, directory / "hf-untied", engine=engine, device="cuda")
        right = wrap(expected(directory))
        _equal(model, local_parameters(right))
        tokens = torch.arange(34, device="cuda").reshape(2, 17)
        with torch.no_grad():
            assert torch.equal(model(tokens), right(tokens))
        return len(report.loaded)

    return scene


def _fills(dtype: torch.dtype, jobs: int) -> Scene:
    """All tiles of a large checkpoint arrive, and neither side holds more than it must."""

    def scene(directory: Path) -> Any:
        model = large(dtype)
        for layer in model.get_submodule("layers").children():
            fully_shard(layer)
        fully_shard(model)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        load_init_weights(model, directory / "large", jobs=jobs)
        above = torch.cuda.max_memory_allocated() - before
        right = torch.load(directory / "large.pt")
        _equal(model, {key: tensor.to(dtype) for key, tensor in right.items()})
        return above - ROWS * COLUMNS * TENSORS * dtype.itemsize

    return scene


def _while_the_gpu_is_busy(directory: Path) -> Any:
    """Memory that a queued kernel still reads is not written before that kernel has ended."""
    model = large()
    model.to_empty(device="cuda")
    weight = model.get_parameter("layers.0.weight")
    with torch.no_grad():
        weight.fill_(3.0)
    factor = torch.full((4096, 4096), 1.0, device="cuda")
    for _ in range(40):  # some 0.1 s of work before the sum below begins
        factor = (factor @ factor).clamp_(max=1.0)
    total = weight.detach().sum() * factor.max()
    load_init_weights(model, directory / "large")
    _equal(model, torch.load(directory / "large.pt"))
    return total.item() == 3.0 * ROWS * COLUMNS


def _pins(directory: Path) -> Any:
    """What goes to the GPU goes through pinned memory, on a stream beside the one that computes."""
    seen: list[tuple[bool, bool]] = []

    class Watched(Cuda):
        def copy(self, source: Tensor, into: Tensor) -> Any:
            started = super().copy(source, into)
            beside = self._stream != torch.cuda.default_stream()
            seen.append((source.is_pinned(), beside))
            return started

    def watched(tensor: Tensor) -> Watched:
        return Watched(tensor.device)

    with patch.object(reading, "device_of", watched):
        load_init_weights(large().to_empty(device="cuda"), directory / "large", jobs=2)
    return [len(seen) >= TENSORS, all(pinned for pinned, _ in seen), all(b for _, b in seen)]


def _reads(directory: Path) -> Any:
    """Stock ``dcp.load`` with our reader, into tensors on the GPU."""
    model = fsdp2()(build(meta=False))
    state = get_model_state_dict(model)
    dcp_load(state, storage_reader=CheckpointReader(directory / "hf-untied", to="lingua"))
    set_model_state_dict(model, state)
    _equal(model, local_parameters(fsdp2()(expected(directory))))
    return True


def _saves(directory: Path) -> Any:
    """A sharded model on the GPU and the same model on the CPU leave the same bytes."""
    config = directory / "hf-untied"
    save_weights(
        fsdp2()(expected(directory)), directory / "from-gpu", to="hf", assets=config, dtype="bf16"
    )
    save_weights(
        expected(directory, device="cpu"),
        directory / "from-cpu",
        to="hf",
        assets=config,
        dtype="bf16",
    )
    one, other = (directory / f"from-{name}/model.safetensors" for name in ("gpu", "cpu"))
    return one.read_bytes() == other.read_bytes()


SCENES: dict[int, dict[str, Scene]] = {
    1: {
        "loads/plain": _loads(is_sharded=False, engine="auto"),
        "loads/fsdp2": _loads(is_sharded=True, engine="auto"),
        "loads/torch": _loads(is_sharded=True, engine="torch"),
        "fills/fp32": _fills(torch.float32, 1),
        "fills/fp32-threads": _fills(torch.float32, 4),
        "fills/bf16": _fills(torch.bfloat16, 4),
        "busy": _while_the_gpu_is_busy,
        "pins": _pins,
        "reads": _reads,
        "saves": _saves,
    }
}

if __name__ == "__main__":
    take_part(SCENES, backend="nccl")
