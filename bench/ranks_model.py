"""A model of DTensors on a fake mesh, and a world whose other ranks answer by their placements."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.ranks import Scale
from dcpconv.loading.replicas import Lot
from dcpconv.loading.world import World

Payload = TypeVar("Payload")


def hsdp_model(
    shapes: Mapping[str, tuple[int, ...]], *, rank: int, replicas: int, shards: int
) -> nn.Module:
    """Parameters on the meta device, as FSDP2 shards them over one mesh dim of two."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=replicas * shards)
    mesh = init_device_mesh("cpu", (replicas, shards))
    model = nn.Module()
    modules: dict[str, nn.Module] = {"": model}

    def module(name: str) -> nn.Module:
        if name not in modules:
            parent, _, last = name.rpartition(".")
            modules[name] = nn.Module()
            module(parent).add_module(last, modules[name])
        return modules[name]

    for key, shape in shapes.items():
        parent, _, name = key.rpartition(".")
        each = -(-shape[0] // shards)
        rows = max(0, min(each, shape[0] - each * (rank % shards)))
        local = torch.empty((rows, *shape[1:]), dtype=torch.bfloat16, device="meta")
        stride = torch.empty(shape, device="meta").stride()
        tensor = DTensor.from_local(
            local,
            mesh,
            [Replicate(), Shard(0)],
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )
        module(parent).register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return model


@dataclass(frozen=True)
class Simulated(World):
    """One rank among others that are not there.

    Attributes:
        scale: The job.
        tape: What rank 0 says, written by it and read by the others.
        messages: How often ranks met, by kind.
    """

    scale: Scale = field(kw_only=True)
    tape: Path = field(kw_only=True)
    messages: Counter[str] = field(default_factory=Counter, kw_only=True)
    counts: Counter[str] = field(default_factory=Counter, kw_only=True)
    told: list[Any] = field(default_factory=list, kw_only=True)

    @classmethod
    def of_rank(cls, rank: int, scale: Scale, tape: Path) -> Simulated:
        """A rank before it says anything."""
        told = pickle.loads(tape.read_bytes()) if rank else []
        group = dist.group.WORLD
        return cls(group, rank, scale.ranks, "", scale=scale, tape=tape, told=told)

    @property
    def said(self) -> int:
        """Bytes that this rank sent."""
        return self.counts["said"]

    @property
    def heard(self) -> int:
        """Bytes that it was sent."""
        return self.counts["heard"]

    @property
    def catalog(self) -> int:
        """Bytes of the largest thing that rank 0 said."""
        return max((len(pickle.dumps(one)) for one in self.told), default=0)

    def gather(self, payload: Payload) -> list[Payload]:
        """What all say: the same, but for their hosts and their shards."""
        nbytes = len(pickle.dumps(payload))
        self._count("gather", nbytes, nbytes * self.size)
        return [self._as(rank, payload) for rank in range(self.size)]

    def _as(self, rank: int, payload: Any) -> Any:
        if isinstance(payload, tuple) and payload and payload[0] == self.scale.host(self.rank):
            return (self.scale.host(rank), *payload[1:])
        if isinstance(payload, dict) and (rank - self.rank) % self.scale.shards:
            salt = (rank % self.scale.shards).to_bytes(4, "little")
            return {
                name: replace(lot, digest=salt + lot.digest) if isinstance(lot, Lot) else lot
                for name, lot in payload.items()
            }
        return payload

    def from_rank(self, payload: Payload, rank: int) -> Payload:
        """What rank 0 said, in the order in which it did."""
        assert rank == 0, "nobody else has anything to say"
        at = self.counts["broadcasts"]
        self.counts["broadcasts"] += 1
        if self.rank == 0:
            self.told.append(payload)
            self._count("broadcast", len(pickle.dumps(payload)), 0)
            return payload
        found: Payload = self.told[at]
        self._count("broadcast", 0, len(pickle.dumps(found)))
        return found

    def in_common(self, marks: bytearray) -> bytes:
        """All ranks hold a part of every tensor."""
        self._count("reduce", len(marks), len(marks))
        return bytes(marks)

    def close(self) -> None:
        """Keep what rank 0 has said for the others."""
        if self.rank == 0:
            self.tape.write_bytes(pickle.dumps(self.told))

    def _count(self, kind: str, said: int, heard: int) -> None:
        self.messages[kind] += 1
        self.counts["said"] += said
        self.counts["heard"] += heard
