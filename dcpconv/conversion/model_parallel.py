"""A model in Meta's model-parallel files: every rank's share of each tensor in its own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

from dcpconv.core.catalog import KeyPath
from dcpconv.core.declared import size_of
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Fill, OutChunk, Outline, OutTensor, Part
from dcpconv.core.spec import ModelSpec
from dcpconv.formats import torchfile
from dcpconv.formats.torchfile import meta_ranks as metashards
from dcpconv.formats.torchfile.meta_ranks import Cut
from dcpconv.plan.coverage import Coverage, Target
from dcpconv.plan.fills import fill_of

Shares = tuple[tuple[OutTensor, ...], ...]
"""Tensors of every rank."""

_TOWER_HEADS = "vision_config.num_attention_heads"
_LLAMA3_THETA = 500_000.0
"""RoPE base from which on releases named ``meta`` cut the embedding along the vocabulary."""


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
    is_recent = coverage.target != "meta"
    by_vocabulary = is_recent or (spec is not None and spec.rope_theta >= _LLAMA3_THETA)
    shapes = {target.key: target.shape for target in coverage.targets}
    uneven = _uneven_heads(spec, ranks)
    made: list[list[OutTensor]] = [[] for _ in range(ranks)]
    for target in coverage.targets:
        shape = target.shape
        hidden = shape[1] if by_vocabulary and len(shape) > 1 else -1
        cut = metashards.cut_of(target.key, shapes, hidden)
        if cut is not None and any(length % ranks for length in cut.lengths):
            uneven.append((target.key, f"{list(shape)} along dim {cut.dim}"))
            continue
        dtype, path = dtype_of(target), path_of(target.key)
        key = ".".join(map(str, path))
        tied = ".".join(map(str, path_of(target.tied_to))) if target.tied_to else None
        # The embedding may be cut along another dim than the head it is tied to.
        is_tied = cut is not None and cut.dim == 0
        for rank, tensors in enumerate(made):
            sizes, fill = _share(target, cut, rank, ranks, dtype)
            chunk = OutChunk((0,) * len(sizes), sizes, fill)
            tensors.append(OutTensor(key, path, dtype, sizes, (chunk,), tied if is_tied else None))
    if uneven:
        raise FormatError(f"tensors cannot be cut into {ranks} equal parts", uneven)
    return tuple(map(tuple, made))


def _uneven_heads(spec: ModelSpec | None, ranks: int) -> list[tuple[str, str]]:
    """Counts of heads that are not the same in every file; no head may be cut."""
    if spec is None:
        return []
    counts = {"n_heads": spec.n_heads, "n_kv_heads": spec.n_kv_heads}
    in_tower = size_of(_TOWER_HEADS, spec.stated)
    if in_tower is not None:
        counts[_TOWER_HEADS] = in_tower
    return [
        (name, f"{count} heads, of which each is in one file whole")
        for name, count in counts.items()
        if count % ranks
    ]


def _share(
    target: Target, cut: Cut | None, rank: int, ranks: int, dtype: DType
) -> tuple[tuple[int, ...], Fill]:
    """A rank's share of a tensor: its shape, and how it is filled."""
    shape = target.shape
    at = (0,) * len(shape)
    if cut is None:
        return shape, fill_of(target, at, shape, dtype=dtype)
    dim = cut.dim
    fills: list[Fill] = []
    before = 0
    for length in cut.lengths:
        size = length // ranks
        offsets = (*at[:dim], before + rank * size, *at[dim + 1 :])
        sizes = (*shape[:dim], size, *shape[dim + 1 :])
        fills.append(fill_of(target, offsets, sizes, dtype=dtype))
        before += length
    return (*shape[:dim], shape[dim] // ranks, *shape[dim + 1 :]), _stacked(fills)


def _stacked(fills: Sequence[Fill]) -> Fill:
    """Fills of boxes of one tensor that follow each other along the first dim, as one."""
    parts: list[Part] = []
    numel = 0
    for fill in fills:
        parts.extend(replace(part, target=part.target + numel) for part in fill.parts)
        numel += fill.numel
    data = [fill.data for fill in fills if fill.data is not None]
    return replace(fills[0], numel=numel, parts=tuple(parts), data=b"".join(data) if data else None)


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
