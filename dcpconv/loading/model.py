"""Every tensor of a live model under its FQN, whatever has been wrapped around it.

Wrappers are seen through: DDP, FSDP1, ``torch.compile`` and activation checkpointing put components
into names that no checkpoint has.  FSDP2 and tensor parallelism leave names alone and turn
parameters into DTensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dcpconv.loading.memory import inner
from dcpconv.sources.fitting import WRAPPERS


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """A parameter that FSDP1 keeps as an interval of one flat, sharded tensor.

    Attributes:
        flat: The flat parameter; outside forward and backward its data is this rank's shard.
        index: Which of its parameters.
    """

    flat: Any
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(self.flat._shapes[self.index])  # noqa: SLF001

    @property
    def interval(self) -> tuple[int, int]:
        """``(first element, end)`` of the flattened parameter that this rank holds."""
        info = self.flat._shard_param_infos[self.index]  # noqa: SLF001
        if not info.in_shard:
            return 0, 0
        return info.intra_param_start_idx, info.intra_param_end_idx + 1

    @property
    def local(self) -> Tensor:
        """The memory of that interval."""
        info = self.flat._shard_param_infos[self.index]  # noqa: SLF001
        data: Tensor = self.flat.data
        if not info.in_shard:
            return data[:0]
        return data[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]


@dataclass(frozen=True, slots=True)
class Place:
    """One parameter or buffer of a model.

    Attributes:
        fqns: Its names; more than one where it is tied.
        module: The module that has it.
        name: The attribute.
        is_parameter: Whether it is no buffer.
        is_persistent: Whether a ``state_dict`` has it.
        flat: Where FSDP1 keeps it.
    """

    fqns: tuple[str, ...]
    module: nn.Module
    name: str
    is_parameter: bool
    is_persistent: bool
    flat: FlatPiece | None = None

    @property
    def fqn(self) -> str:
        """Its first name."""
        return self.fqns[0]

    @property
    def tensor(self) -> Tensor:
        """As the module has it now: materialising a model replaces tensors."""
        if self.flat is not None:
            flat: Tensor = self.flat.flat
            return flat
        tensor: Tensor = getattr(self.module, self.name)
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.flat.shape if self.flat is not None else tuple(self.tensor.shape)

    @property
    def is_meta(self) -> bool:
        """Whether it has no memory yet."""
        return self.tensor.is_meta

    @property
    def local(self) -> Tensor:
        """This rank's part, as an alias of the live memory."""
        if self.flat is not None:
            return self.flat.local
        tensor = self.tensor.detach()
        return inner(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def places(model: nn.Module) -> tuple[Place, ...]:
    """Every parameter and buffer, tied ones once, in the order of ``state_dict``."""
    flats = flat_pieces(model)
    found: dict[object, Place] = {}
    for prefix, module in walk(model):
        flat_names = [name for owner, name in flats if owner is module]
        names = dict.fromkeys([*module._parameters, *flat_names, *module._buffers])  # noqa: SLF001
        for name in names:
            flat = flats.get((module, name))
            tensor = None if flat else getattr(module, name)
            if (tensor is None and flat is None) or name == "_flat_param":
                continue
            identity: object = (id(flat.flat), flat.index) if flat else id(tensor)
            known = found.get(identity)
            fqns = (prefix + name,)
            is_buffer = name in module._buffers  # noqa: SLF001
            if known is None or is_buffer != (not known.is_parameter):
                found[identity] = Place(
                    fqns,
                    module,
                    name,
                    not is_buffer,
                    name not in module._non_persistent_buffers_set,  # noqa: SLF001
                    flat,
                )
            elif fqns[0] not in known.fqns:
                found[identity] = Place(
                    (*known.fqns, *fqns),
                    known.module,
                    known.name,
                    known.is_parameter,
                    known.is_persistent,
                    flat,
                )
    return tuple(found.values())


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with the prefix of its FQNs; one that is used twice appears under both."""
    yield prefix, module
    for name, child in module._modules.items():  # noqa: SLF001
        if child is None:
            continue
        is_wrapped = name in WRAPPERS or (
            name == "module" and isinstance(module, DistributedDataParallel)
        )
        yield from walk(child, prefix if is_wrapped else f"{prefix}{name}.")


def reshard(model: nn.Module) -> None:
    """Make modules that FSDP2 left unsharded hold their shards again: what is written into
    gathered parameters would be lost."""
    for module in model.modules():
        call = getattr(module, "reshard", None)
        if call is not None and type(module).__name__.startswith("FSDP"):
            call()


def device_of(tensor: Tensor, home: torch.device) -> torch.device:
    """Where the memory of a tensor on the meta device belongs; ``home`` if no mesh says it."""
    return _device_of_mesh(tensor) if isinstance(tensor, DTensor) else home


def home_of(model: nn.Module) -> torch.device:
    """Where tensors on the meta device belong that no mesh places: beside those that one places,
    as norms beside tensor parallelism, else beside those that have memory, else on the CPU."""
    has_memory: torch.device | None = None
    for tensor in chain(model.parameters(), model.buffers()):
        if isinstance(tensor, DTensor):
            return _device_of_mesh(tensor)
        if not tensor.is_meta:
            has_memory = has_memory or tensor.device
    return has_memory or torch.device("cpu")


def _device_of_mesh(tensor: DTensor) -> torch.device:
    kind = tensor.device_mesh.device_type
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", torch.cuda.current_device())


def flat_pieces(model: nn.Module) -> dict[tuple[nn.Module, str], FlatPiece]:
    """The parameters that FSDP1 manages, by the module and name they had before."""
    pieces: dict[tuple[nn.Module, str], FlatPiece] = {}
    if not any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return pieces
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = module._handle  # noqa: SLF001
        if handle is None:
            continue
        flat = handle.flat_param
        for index, info in enumerate(flat._param_infos):  # noqa: SLF001
            pieces[info.module, info.param_name] = FlatPiece(flat, index)
        for shared in flat._shared_param_infos:  # noqa: SLF001
            owner = pieces[shared.prim_module, shared.prim_param_name]
            pieces[shared.module, shared.param_name] = owner
    return pieces
