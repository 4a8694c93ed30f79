"""torchtitan's own package on a CPU in fp32.

Two parts are replaced: the attention kernels, which want a GPU, and the grouped product of experts,
which the package carries out in bf16.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn


def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the package importable without triton, and its experts multiply in fp32."""
    kernels = "torchtitan.distributed.minimal_async_ep.kernels"
    if importlib.util.find_spec("triton") is None:
        # Kernels for experts on several devices, which the package imports whatever it runs on.
        monkeypatch.setitem(sys.modules, kernels, MagicMock())
    from torchtitan.models.common.moe import GroupedExperts

    forward = GroupedExperts.forward
    monkeypatch.setattr(GroupedExperts, "forward", without_bf16(forward))
    monkeypatch.setattr(GroupedExperts, "_grouped_mm", _grouped_product)


def without_bf16(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method in which no tensor is rounded to bf16."""

    def run(*arguments: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "bfloat16", lambda tensor: tensor)
            return forward(*arguments)

    return run


def _grouped_product(self: Any, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:  # noqa: N803
    del self
    starts = [0, *offs.tolist()]
    made = torch.zeros(A.shape[0], B_t.shape[-1])
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        made[start:stop] = A[start:stop] @ B_t[number]
    return made


class Attend(nn.Module):
    """Causal attention in place of a kernel, over a window of keys where there is one."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Of queries [batch, seq, heads, channels]; ``out_transform`` gets the result and the
        logarithm of every sum of exponentials, [batch, seq, heads]."""
        del attention_masks
        if enable_gqa:
            repeats = q.shape[2] // k.shape[2]
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
        at = torch.arange(q.shape[1])
        sees = at[:, None] >= at[None, :]
        if self.window is not None:
            sees &= at[:, None] - at[None, :] < self.window
        scores = scores.masked_fill(~sees, -torch.inf)
        out = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
        if out_transform is None:
            return out
        return out_transform(out, scores.logsumexp(-1).transpose(1, 2))


def built(config: Any, *, eps: float) -> Any:
    """The model that torchtitan makes of a config, without weights."""
    model = config.build().eval()
    for module in model.modules():
        if hasattr(module, "inner_attention"):
            module.inner_attention = Attend()
        if isinstance(module, nn.RMSNorm):
            module.eps = eps
    return model
