"""What the reference models share: norms, both kinds of RoPE, attention, random weights."""

from __future__ import annotations

import zlib
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def angles(seq: int, rotary_dim: int, theta: float) -> Tensor:
    """Rotation angle of every position and channel pair: [seq, rotary_dim / 2]."""
    frequency = 1.0 / theta ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    return torch.outer(torch.arange(seq), frequency)


def rotate(x: Tensor, angle: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first ``2 * angle.shape[1]`` channels of ``x`` [batch, seq, head, dim].

    Args:
        x: Queries or keys.
        angle: From ``angles()``; one row per position of ``x``.
        interleaved: Pair neighbours ``(p two)``; otherwise pair the halves ``(two p)``.
    """
    pairs = angle.shape[1]
    turning, still = x[..., : 2 * pairs], x[..., 2 * pairs :]
    shape = (*x.shape[:-1], pairs, 2) if interleaved else (*x.shape[:-1], 2, pairs)
    axis = -1 if interleaved else -2
    left, right = turning.reshape(shape).unbind(axis)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    turned = torch.stack((left * cos - right * sin, right * cos + left * sin), axis)
    return torch.cat((turned.reshape(turning.shape), still), -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of ``q`` [batch, seq, head, dim] over fewer or as many key heads.

    Returns:
        [batch, seq, head * dim]; query head ``i`` reads key head ``i // (heads / kv heads)``.
    """
    repeats = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (
        functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    )


def randomise(model: ModuleT, seed: int = 0) -> ModuleT:
    """Give every stored tensor values of its own, in place.

    A norm left at one or a bias left at zero hides a swap or a drop.  Each tensor's values depend
    only on its key and the seed, so two models of one family agree whatever their order.
    """
    skipped = ("inv_freq", "mask")  # computed, not learned
    with torch.no_grad():
        for key, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point() or key.endswith(skipped) or not tensor.numel():
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) + seed)
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            else:
                tensor.copy_(noise * 0.2 + (0.0 if key.endswith("bias") else 1.0))
    return model.eval()


def random_tokens(vocab: int, *, batch: int = 2, seq: int = 23, seed: int = 0) -> Tensor:
    """Token ids [batch, seq]."""
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows ``(h p two)`` as ``(h two p)``: the reordering that our tables express as layouts."""
    rows = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape)


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows ``(h two p)`` as ``(h p two)``."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape)
