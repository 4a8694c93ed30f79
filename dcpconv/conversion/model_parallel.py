"""A model in Meta's model-parallel files: every rank's share of each tensor in its own file."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from dcpconv.core.catalog import KeyPath, TensorEntry
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import OutChunk, Outline, OutTensor
from dcpconv.core.spec import ModelSpec
from dcpconv.formats import torchfile
from dcpconv.formats.torchfile import meta_ranks as metashards
from dcpconv.plan.coverage import Coverage, Target
from dcpconv.plan.fills import fill_of

Shares = tuple[tuple[OutTensor, ...], ...]
"""Tensors of every rank."""

_LLAMA3_THETA = 500_000.0
"""RoPE base from which on releases cut the embedding along the vocabulary."""


def shares(
    coverage: Coverage,
    ranks: int,
    *,
    spec: ModelSpec | None,
    path_of: Callable[[str], KeyPath],
    dtype_of: Callable[[Target], DType],
) -> Shares:
    """Every rank's tensors and how they are filled.

    Args:
        coverage: A coverage without faults, in Meta's naming.
        ranks: How many files.
        spec: The model's numbers; they say how the release cuts its embedding.
        path_of: Where a bare target key nests in each file.
        dtype_of: Element type to store a tensor as.

    Raises:
        FormatError: A dim cannot be cut into equal parts; lists every one.
    """
    by_vocabulary = spec is not None and spec.rope_theta >= _LLAMA3_THETA
    uneven = []
    made: list[list[OutTensor]] = [[] for _ in range(ranks)]
    for target in coverage.targets:
        entry = TensorEntry(target.key, target.dtype, target.shape, ())
        hidden = target.shape[1] if by_vocabulary and len(target.shape) > 1 else -1
        dim = metashards.cut_of(entry, hidden)
        if dim is not None and target.shape[dim] % ranks:
            uneven.append((target.key, f"{list(target.shape)} along dim {dim}"))
            continue
        dtype, path = dtype_of(target), path_of(target.key)
        key = ".".join(map(str, path))
        tied = ".".join(map(str, path_of(target.tied_to))) if target.tied_to else None
        for rank, tensors in enumerate(made):
            sizes = tuple(n // ranks if at == dim else n for at, n in enumerate(target.shape))
            offsets = tuple(rank * sizes[at] if at == dim else 0 for at in range(len(target.shape)))
            fill = fill_of(target, offsets, sizes, dtype=dtype)
            chunk = OutChunk((0,) * len(sizes), sizes, fill)
            # The embedding may be cut along another dim than the head it is tied to.
            tensors.append(OutTensor(key, path, dtype, sizes, (chunk,), tied if dim == 0 else None))
    if uneven:
        raise FormatError(f"tensors cannot be cut into {ranks} equal parts", uneven)
    return tuple(map(tuple, made))


def outline(tensors: Shares, *, modulus: int) -> Outline:
    """The files of all ranks."""
    each = [
        torchfile.outline(share, {}, filename=metashards.name(rank), modulus=modulus)
        for rank, share in enumerate(tensors)
    ]
    return Outline(
        tuple(chain.from_iterable(item.files for item in each)),
        tuple(chain.from_iterable(item.commit for item in each)),
    )
