"""What the oldest torch and transformers that we run with have not got: another way to the same,
or the reason why a test is skipped.

``make matrix`` runs the tests with them; ``docs/versions.md`` says which.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, Shard

_CLASSES: Final = {"internlm3": "5.23"}
"""First version of transformers that we know to have a class of our tables."""


def is_older(package: str, than: str) -> bool:
    """Whether an older version is installed; both by their first two numbers."""
    installed = version(package).split(".")[:2]
    return tuple(map(int, installed)) < tuple(map(int, than.split(".")[:2]))


def needs(package: str, since: str, what: str) -> pytest.MarkDecorator:
    """Skips what needs a newer version.

    Args:
        package: ``torch`` or ``transformers``.
        since: The first version known to have it, as ``2.7``.
        what: What the test needs from it.
    """
    return pytest.mark.skipif(is_older(package, since), reason=f"{what}: {package} {since}")


def require_class(model_type: str) -> None:
    """Skips a test of a model that the installed transformers is too old to have."""
    since = _CLASSES.get(model_type)
    if since is not None and is_older("transformers", since):
        pytest.skip(f"{model_type}: transformers {since}")


def of_torch(name: str, *values: object) -> Any:
    """A parameter of a test, with a skip where torch has no such element type."""
    since = {"float8_e8m0fnu": "2.7", "float4_e2m1fn_x2": "2.8"}.get(name)
    marks = [] if since is None else [needs("torch", since, name)]
    return pytest.param(*(values or (name,)), marks=marks, id=None if values else name)


# --------------------------------------------------------------------------------------- no_dist


def _has(function: Any, option: str) -> bool:
    return option in inspect.signature(function).parameters


def save_alone(
    state: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: Any = None,
    **options: Any,
) -> None:
    """``save(no_dist=True)``, which torch 2.6 has only below its surface."""
    if _has(state_dict_saver.save, "no_dist"):
        state_dict_saver.save(
            state,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            no_dist=True,
            **options,
        )
        return
    writer = storage_writer or FileSystemWriter(str(checkpoint_id))
    state_dict_saver._save_state_dict(state, writer, no_dist=True, **options)


def load_alone(
    state: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: Any = None,
) -> None:
    """``load(no_dist=True)``, which torch 2.6 has only below its surface."""
    if _has(state_dict_loader.load, "no_dist"):
        state_dict_loader.load(
            state, checkpoint_id=checkpoint_id, storage_reader=storage_reader, no_dist=True
        )
        return
    reader = storage_reader or FileSystemReader(str(checkpoint_id))
    state_dict_loader._load_state_dict(state, reader, no_dist=True)


# ------------------------------------------------------------------------------------- placements


def placed(tensor: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """``distribute_tensor(src_data_rank=None)``: every rank takes its part of what it has.

    Before torch 2.7 rank 0 would send the parts.
    """
    if _has(distribute_tensor, "src_data_rank"):
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    local = tensor
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts, _ = placement._split_tensor(local, mesh.size(dim), with_padding=False)
            local = parts[mesh.get_local_rank(dim)].clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
