"""A transformer with the parameter names, shapes and arithmetic of Lingua's ``LMTransformer``.

Small enough to read in one sitting, and enough to prove that a converted checkpoint is right: its
logits equal Lingua's.  Written from the description of the format, without Lingua's code.

Source: facebookresearch/lingua@437d680, ``lingua/transformer.py`` and ``apps/main/transformer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class LinguaParams:
    """The fields of ``params.json``'s ``model`` that decide shapes and arithmetic.

    Either ``n_heads`` or ``head_dim`` may be left out, then ``dim = n_heads * head_dim``.
    """

    dim: int = 512
    n_layers: int = 8
    head_dim: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    ffn_dim_multiplier: float | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seqlen: int = 1024
    vocab_size: int
    weight_tying: bool = False

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.n_heads or self.dim // self.channels

    @property
    def channels(self) -> int:
        """Channels of one head; even."""
        if self.head_dim is not None:
            return self.head_dim
        if self.n_heads is None:
            raise ValueError("params.json names neither n_heads nor head_dim")
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_kv_heads or self.heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layers, by Lingua's formula.

        >>> LinguaParams(dim=4096, n_heads=32, ffn_dim_multiplier=1.3, vocab_size=7).ffn_dim
        14336
        """
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)


class RotaryEmbedding(nn.Module):
    """Rotation matrices for every position: ``freqs_cis`` [max_seqlen, head_dim / 2, 2, 2].

    The buffer is not persistent, so no checkpoint restores it: whoever materialises a model from
    the meta device calls ``reset_parameters()``.
    """

    freqs_cis: Tensor

    def __init__(self, params: LinguaParams) -> None:
        super().__init__()
        self.params = params
        shape = (params.max_seqlen, params.channels // 2, 2, 2)
        self.register_buffer("freqs_cis", torch.empty(shape), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the matrices in place, in fp32."""
        device = self.freqs_cis.device
        exponent = torch.arange(0, self.params.channels, 2, device=device) / self.params.channels
        frequency = 1.0 / self.params.rope_theta**exponent
        position = torch.arange(self.params.max_seqlen, device=device)
        angle = torch.outer(position, frequency)
        cos, sin = angle.cos(), angle.sin()
        self.freqs_cis.copy_(torch.stack((cos, -sin, sin, cos), -1).view_as(self.freqs_cis))


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn neighbouring channels ``(x0, x1), (x2, x3), ...`` of ``x`` [batch, seq, head, dim]."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    turned = torch.einsum("spij,bshpj->bshpi", freqs_cis[: x.shape[1]], pairs)
    return turned.flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """Root mean square norm; the weight is multiplied in fp32, before the cast back."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).type_as(x)


class TiedLinear(nn.Module):
    """An output layer that uses the embedding's weight, under a key of its own."""

    def __init__(self, tied_module: nn.Embedding) -> None:
        super().__init__()
        self.tied_module = tied_module

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x``."""
        return functional.linear(x, self.tied_module.weight)


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, params: LinguaParams) -> None:
        super().__init__()
        self.head_dim = params.channels
        query, group = params.heads * params.channels, params.kv_heads * params.channels
        self.wq = nn.Linear(params.dim, query, bias=False)
        self.wk = nn.Linear(params.dim, group, bias=False)
        self.wv = nn.Linear(params.dim, group, bias=False)
        self.wo = nn.Linear(query, params.dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        """Attend over ``x`` [batch, seq, dim]."""
        q, k, v = (
            linear(x).view(*x.shape[:-1], -1, self.head_dim)
            for linear in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, freqs_cis), rotate(k, freqs_cis)
        repeats = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: ``w1`` is the gate, ``w3`` goes up, ``w2`` comes down."""

    def __init__(self, params: LinguaParams) -> None:
        super().__init__()
        self.w1 = nn.Linear(params.dim, params.ffn_dim, bias=False)
        self.w3 = nn.Linear(params.dim, params.ffn_dim, bias=False)
        self.w2 = nn.Linear(params.ffn_dim, params.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every position by itself."""
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """Attention, then feed-forward, each on the normed residual stream."""

    def __init__(self, params: LinguaParams) -> None:
        super().__init__()
        self.attention = Attention(params)
        self.feed_forward = FeedForward(params)
        self.attention_norm = RMSNorm(params.dim, params.norm_eps)
        self.ffn_norm = RMSNorm(params.dim, params.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        """Add both branches to ``x`` [batch, seq, dim]."""
        x = x + self.attention(self.attention_norm(x), freqs_cis)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class LinguaModel(nn.Module):
    """The language model; build it on the meta device to load weights from elsewhere."""

    def __init__(self, params: LinguaParams) -> None:
        super().__init__()
        self.params = params
        # Lingua's base class comes first in the state dict, so the layers precede the embedding.
        self.rope_embeddings = RotaryEmbedding(params)
        self.layers = nn.ModuleList(Block(params) for _ in range(params.n_layers))
        self.tok_embeddings = nn.Embedding(params.vocab_size, params.dim)
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = (
            TiedLinear(self.tok_embeddings)
            if params.weight_tying
            else nn.Linear(params.dim, params.vocab_size, bias=False)
        )

    @classmethod
    def from_params(
        cls, params: Mapping[str, object], *, max_seqlen: int | None = None
    ) -> LinguaModel:
        """Build the model that a ``params.json`` describes.

        Args:
            params: The whole file; only ``params["model"]`` is used.
            max_seqlen: Positions to prepare instead of the file's (Lingua's trainer does this too).
        """
        model = params["model"]
        if not isinstance(model, Mapping):
            raise TypeError(f"params.json: model is {model!r}, expected a mapping")
        known = {field.name for field in fields(LinguaParams)}
        chosen = {name: value for name, value in model.items() if name in known}
        if max_seqlen is not None:
            chosen["max_seqlen"] = max_seqlen
        return cls(LinguaParams(**chosen))

    def init_weights(self, *, seed: int = 0) -> None:
        """Draw every weight anew, the spread of each matrix from its input width."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in self.modules():
                if isinstance(module, nn.Embedding | nn.Linear):
                    spread = module.weight.shape[-1] ** -0.5
                    nn.init.trunc_normal_(module.weight, std=spread, a=-3 * spread, b=3 * spread)
                elif isinstance(module, RMSNorm | RotaryEmbedding):
                    module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of ``tokens`` [batch, seq]."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.rope_embeddings.freqs_cis)
        out: Tensor = self.output(self.norm(x))
        return out
