"""A Lingua-shaped model under every parallelism, and the weights it must have after loading."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from lingua_model import LinguaModel, LinguaParams

LAYERS, DIM, HEADS, KV_HEADS, CHANNELS, VOCAB = 3, 96, 6, 2, 16, 131
"""As ``support.models.hf_models`` makes its Llama: no power of two to hide a mistake."""

DEVICE = os.environ.get("DCPCONV_TEST_DEVICE", "cpu")
"""Where models are: ``cuda`` puts all ranks of a world on one GPU, which gloo allows."""

Wrap = Callable[[nn.Module], nn.Module]


def params(*, tied: bool = False) -> LinguaParams:
    """Sizes of ``support.models.hf_models``; the formula for the ffn needs a factor."""
    made = LinguaParams(
        dim=DIM,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        head_dim=CHANNELS,
        ffn_dim_multiplier=0.58,
        multiple_of=8,
        norm_eps=1e-5,
        max_seqlen=64,
        vocab_size=VOCAB,
        weight_tying=tied,
    )
    assert made.ffn_dim == 152
    return made


def build(*, meta: bool, tied: bool = False, dtype: torch.dtype = torch.float32) -> LinguaModel:
    """The model, with memory or without; weights are garbage either way."""
    with torch.device("meta"):
        model = LinguaModel(params(tied=tied)).to(dtype)
    if not meta:
        model.to_empty(device=DEVICE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
    return model


def lingua_weights(source: Mapping[str, Tensor], *, tied: bool = False) -> dict[str, Tensor]:
    """A Llama of transformers in Lingua's naming, by ``reshape`` and ``transpose`` alone."""

    def pairs(weight: Tensor, heads: int) -> Tensor:
        halves = weight.reshape(heads, 2, CHANNELS // 2, DIM)
        return halves.transpose(1, 2).reshape(heads * CHANNELS, DIM)

    found = {
        "tok_embeddings.weight": source["model.embed_tokens.weight"],
        "norm.weight": source["model.norm.weight"],
    }
    head = "output.tied_module.weight" if tied else "output.weight"
    found[head] = source["lm_head.weight"]
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        found |= {
            f"{new}attention_norm.weight": source[f"{old}input_layernorm.weight"],
            f"{new}ffn_norm.weight": source[f"{old}post_attention_layernorm.weight"],
            f"{new}attention.wq.weight": pairs(source[f"{old}self_attn.q_proj.weight"], HEADS),
            f"{new}attention.wk.weight": pairs(source[f"{old}self_attn.k_proj.weight"], KV_HEADS),
            f"{new}attention.wv.weight": source[f"{old}self_attn.v_proj.weight"],
            f"{new}attention.wo.weight": source[f"{old}self_attn.o_proj.weight"],
            f"{new}feed_forward.w1.weight": source[f"{old}mlp.gate_proj.weight"],
            f"{new}feed_forward.w3.weight": source[f"{old}mlp.up_proj.weight"],
            f"{new}feed_forward.w2.weight": source[f"{old}mlp.down_proj.weight"],
        }
    return found


def expected(directory: Path, *, tied: bool = False, device: str = DEVICE) -> LinguaModel:
    """The model with the weights that loading must give it, unsharded."""
    with torch.device(device):  # tables of RoPE have other bits where they are made elsewhere
        model = LinguaModel(params(tied=tied))
    weights = torch.load(directory / ("tied.pt" if tied else "untied.pt"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def plain(model: nn.Module) -> nn.Module:
    """No parallelism."""
    return model


def ddp(model: nn.Module) -> nn.Module:
    """Replicas."""
    return DistributedDataParallel(model)


def fsdp1(*, original: bool) -> Wrap:
    """FSDP1 with one unit per layer."""

    def wrap(model: nn.Module) -> nn.Module:
        kinds = {type(model.get_submodule("layers.0"))}
        return FullyShardedDataParallel(
            model,
            use_orig_params=original,
            device_id=torch.device(DEVICE),
            auto_wrap_policy=ModuleWrapPolicy(kinds),
        )

    return wrap


def fsdp2(mesh: DeviceMesh | None = None, **options: Any) -> Wrap:
    """FSDP2 with one group per layer; over two mesh dims it is HSDP."""

    def wrap(model: nn.Module) -> nn.Module:
        at = mesh or init_device_mesh(DEVICE, (dist.get_world_size(),))
        for layer in model.get_submodule("layers").children():
            fully_shard(layer, mesh=at, **options)
        fully_shard(model, mesh=at, **options)
        return model

    return wrap


def hsdp(model: nn.Module) -> nn.Module:
    """Shards over two ranks, replicas over the others."""
    return fsdp2(init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard")))(model)


def offloaded(model: nn.Module) -> nn.Module:
    """FSDP2 with parameters kept on the CPU."""
    return fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))(model)


def tp(mesh: DeviceMesh | None = None, *, uneven: bool = False) -> Wrap:
    """Tensor parallelism in the feed-forward layers; ``uneven`` also splits the vocabulary."""

    def wrap(model: nn.Module) -> nn.Module:
        at = mesh or init_device_mesh(DEVICE, (dist.get_world_size(),))
        plan: dict[str, Any] = {}
        for layer in range(LAYERS):
            name = f"layers.{layer}.feed_forward"
            plan |= {
                f"{name}.w1": ColwiseParallel(),
                f"{name}.w3": ColwiseParallel(),
                f"{name}.w2": RowwiseParallel(),
            }
        if uneven:
            plan["output"] = ColwiseParallel()
        return parallelize_module(model, at, plan)

    return wrap


def fsdp2_over_tp(*, uneven: bool) -> Wrap:
    """Both, on a mesh of two by two."""

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))
        return fsdp2(mesh["dp"])(tp(mesh["tp"], uneven=uneven)(model))

    return wrap


def compiled(model: nn.Module) -> nn.Module:
    """``torch.compile`` around FSDP2: adds ``_orig_mod``."""
    wrapped: nn.Module = torch.compile(fsdp2()(model))  # type: ignore[assignment]
    return wrapped


def checkpointed(model: nn.Module) -> nn.Module:
    """Activation checkpointing of every layer under FSDP2, and compiled layers inside."""
    layers = model.get_submodule("layers")
    for name, layer in list(layers.named_children()):
        layers.register_module(name, checkpoint_wrapper(torch.compile(layer)))  # type: ignore[arg-type]
    return fsdp2()(model)


def local_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds, by the name that torch gives it."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor.data
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def local_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Local tensors without the RoPE table, which loading computes again in any case."""
    return {key: tensor for key, tensor in local_tensors(model).items() if "rope" not in key}
