"""held_boxes() against torch's own splitting of a tensor, and boxes against slices."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from dcpconv.loading.geometry import Held, Split, held_boxes, local_shape
from support.versions import is_older


def pasted(tensor: torch.Tensor, boxes: Sequence[Held], like: torch.Tensor) -> torch.Tensor:
    """A local tensor put together from boxes of the whole one."""
    local = torch.full_like(like, -1)
    for box in boxes:
        whole = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        place = tuple(slice(o, o + n) for o, n in zip(box.local, box.sizes, strict=True))
        local[place] = tensor[whole]
    return local


def split_by_torch(tensor: torch.Tensor, splits: Sequence[Split]) -> torch.Tensor:
    for split in splits:
        placement = (
            Shard(split.dim)
            if split.blocks == 1
            else _StridedShard(split.dim, split_factor=split.blocks)
        )
        is_even = tensor.shape[split.dim] % (split.ranks * split.blocks) == 0
        if split.blocks > 1 and not is_even and is_older("torch", "2.13"):
            pytest.skip("_StridedShard of uneven rows: torch 2.13")
        shards, _ = placement._split_tensor(tensor, split.ranks, with_padding=False)
        tensor = shards[split.rank]
    return tensor


@pytest.mark.parametrize("seed", range(300))
def test_boxes_are_what_torch_leaves_of_a_tensor(seed: int) -> None:
    rng = random.Random(seed)
    shape = [rng.randint(0, 11) for _ in range(rng.randint(1, 3))]
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    splits = []
    for _ in range(rng.randint(0, 3)):
        ranks = rng.randint(1, 4)
        blocks = rng.choice([1, 1, 2, 3])
        splits.append(Split(rng.randrange(len(shape)), ranks, rng.randrange(ranks), blocks))
    expected = split_by_torch(tensor, splits)

    boxes = held_boxes(shape, splits)

    assert torch.equal(pasted(tensor, boxes, expected), expected)
    if expected.numel():
        assert local_shape(shape, boxes) == tuple(expected.shape)


def test_fsdp_over_tensor_parallel_shards_what_tensor_parallelism_left() -> None:
    tensor = torch.arange(11)
    for data in range(2):
        for model in range(2):
            expected = tensor.chunk(2)[model].chunk(2)[data]
            boxes = held_boxes((11,), [Split(0, 2, data, blocks=2), Split(0, 2, model)])
            assert torch.equal(pasted(tensor, boxes, expected), expected)
            assert len(boxes) == 1
