"""Process groups for loading: some ranks of the caller's group, or all of them over the CPU.

They are made below ``torch.distributed``'s own list of groups: ``new_group`` wants every rank of
the job to come, or ranks that have made equally many groups before, and a caller's
``process_group`` promises neither.  What is made here meets at a name that follows from its ranks
alone.

Source: torch 2.13 ``distributed/distributed_c10d.py`` (``_hash_ranks_to_str`` counts the groups of
the process), ``torch/csrc/distributed/c10d/ProcessGroupGloo.hpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

_MADE: dict[tuple[Any, tuple[int, ...], str], Any] = {}
"""Groups by the caller's group, their ranks in it and the device they send from: each made once."""


def sends_from(group: Any, kind: str) -> bool:
    """Whether a process group takes tensors on a kind of device: ``cpu`` or ``cuda``."""
    return kind in str(dist.get_backend_config(group))


def subgroup(group: Any, ranks: Sequence[int], *, kind: str = "cpu") -> Any:
    """A process group of some ranks of another one, to be asked for by these ranks alone.

    A rank that is in several must ask for them in the order of their ranks: making one waits for
    the others.

    Args:
        group: What they are part of.
        ranks: Their numbers in ``group``, in order.
        kind: Device that tensors are on: ``cpu`` for gloo, ``cuda`` for NCCL.

    Raises:
        RuntimeError: A rank did not come within the timeout of ``group``.
    """
    key = (group, tuple(ranks), kind)
    if key not in _MADE:
        name = f"dcpconv/{getattr(group, 'group_name', '')}/{kind}/{_name(key[1])}"
        store = distributed_c10d.PrefixStore(name, default_store())
        number = key[1].index(dist.get_rank(group))
        span = timeout_of(group)
        if kind == "cuda":
            options = distributed_c10d.ProcessGroupNCCL.Options()
            options._timeout = span  # noqa: SLF001
            _MADE[key] = distributed_c10d.ProcessGroupNCCL(store, number, len(ranks), options)
        else:
            _MADE[key] = distributed_c10d.ProcessGroupGloo(store, number, len(ranks), span)
    return _MADE[key]


def _name(ranks: tuple[int, ...]) -> str:
    """Ranks in few words: ``0-1023`` or ``0,64,128``."""
    first, last = ranks[0], ranks[-1]
    if ranks == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, ranks))


def default_store() -> Any:
    """The store that the default process group met at; ``None`` where torch hides it."""
    find = getattr(distributed_c10d, "_get_default_store", None)
    return find() if find is not None else None


def timeout_of(group: Any) -> timedelta:
    """How long a group waits for a rank."""
    for kind in ("cpu", "cuda"):
        with suppress(RuntimeError, AttributeError):
            found = group._get_backend(torch.device(kind)).options._timeout  # noqa: SLF001
            if isinstance(found, timedelta):
                return found
    return distributed_c10d.default_pg_timeout


def broadcast(group: Any, tensor: Tensor, *, root: int) -> Any:
    """Starts sending a tensor from ``root``, as ``group`` numbers it; returns what to wait for."""
    options = distributed_c10d.BroadcastOptions()
    options.rootRank = root
    options.rootTensor = 0
    return group.broadcast([tensor], options)


def all_gather(group: Any, tensor: Tensor, *, size: int) -> list[Tensor]:
    """The tensors of all ranks, which have one shape."""
    found = [torch.empty_like(tensor) for _ in range(size)]
    group.allgather([found], [tensor]).wait()
    return found


def minimum(group: Any, tensor: Tensor) -> None:
    """Replaces every element by the least that any rank has there."""
    options = distributed_c10d.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
    group.allreduce([tensor], options).wait()
