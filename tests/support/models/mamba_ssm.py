"""Mamba 2 as state-spaces/mamba computes it, a token at a time and without its kernels.

Source: ``MambaLMHeadModel`` and ``MixerModel`` in ``models/mixer_seq_simple.py``, ``Block`` and
``Mamba2.step`` in ``modules/`` of state-spaces/mamba@e9594ce; the names are its own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.models.layers import RMSNorm, randomise

EPS = 1e-5


@dataclass
class MambaConfig:
    """The fields of the package's own record, which takes no other."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Mamba2(nn.Module):
    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        bias: bool = False,
        conv_bias: bool = True,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        chunk_size: int = 256,
    ) -> None:
        super().__init__()
        del chunk_size  # how much its kernels take at once
        self.inner, self.headdim = expand * d_model, headdim
        self.d_state, self.ngroups, self.dt_limit = d_state, ngroups, dt_limit
        heads, wide = self.inner // headdim, self.inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.inner + wide + heads, bias=bias)
        self.conv1d = nn.Conv1d(wide, wide, d_conv, bias=conv_bias, groups=wide, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(self.inner, EPS)
        self.out_proj = nn.Linear(self.inner, d_model, bias=bias)

    def forward(self, u: Tensor) -> Tensor:
        states = self.ngroups * self.d_state
        heads = self.A_log.numel()
        sizes = [self.inner, self.inner + 2 * states, heads]
        z, xbc, dt = torch.split(torch.as_tensor(self.in_proj(u)), sizes, dim=-1)
        xbc = functional.silu(self.conv1d(xbc.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        x, b, c = torch.split(xbc, [self.inner, states, states], dim=-1)
        step = functional.softplus(dt + self.dt_bias).clamp(*self.dt_limit)
        x = x.reshape(*u.shape[:2], heads, self.headdim)
        b, c = (
            part.reshape(*u.shape[:2], self.ngroups, self.d_state).repeat_interleave(
                heads // self.ngroups, dim=2
            )
            for part in (b, c)
        )
        decay = torch.exp(-torch.exp(self.A_log) * step)
        state = x.new_zeros(*x.shape[:1], heads, self.headdim, self.d_state)
        outputs = []
        for t in range(u.shape[1]):
            added = (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
            state = decay[:, t, :, None, None] * state + added
            outputs.append((state * c[:, t, :, None, :]).sum(-1) + self.D[:, None] * x[:, t])
        y = torch.stack(outputs, dim=1).flatten(2) * functional.silu(z)
        grouped = y.reshape(*u.shape[:2], self.ngroups, self.inner // self.ngroups)
        grouped = functional.rms_norm(grouped, grouped.shape[-1:], eps=EPS)
        return torch.as_tensor(self.out_proj(grouped.flatten(2) * self.norm.weight))


class Block(nn.Module):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        own = {name: value for name, value in config.ssm_cfg.items() if name != "layer"}
        self.norm = RMSNorm(config.d_model, EPS)
        self.mixer = Mamba2(config.d_model, **own)


class MixerModel(nn.Module):
    def __init__(self, config: MambaConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, EPS)


class MambaLMHeadModel(nn.Module):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        vocab_size = config.vocab_size
        vocab_size += -vocab_size % config.pad_vocab_size_multiple
        self.backbone = MixerModel(config, vocab_size)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.backbone.embedding(tokens)
        for layer in self.backbone.layers:
            assert isinstance(layer, Block)
            hidden = hidden + layer.mixer(layer.norm(hidden))
        return torch.as_tensor(self.lm_head(self.backbone.norm_f(hidden)))


def mamba_ssm(seed: int = 0, **fields: Any) -> MambaLMHeadModel:
    """A tiny model in eval mode, every tensor random: odd sizes, two groups of states."""
    state = {"layer": "Mamba2", "d_state": 14, "d_conv": 3, "headdim": 32, "ngroups": 2}
    given = dict(fields)
    ssm = {**state, "chunk_size": 8, **given.pop("ssm_cfg", {})}
    config = MambaConfig(
        **{"d_model": 96, "n_layer": 3, "vocab_size": 131, "ssm_cfg": ssm, **given}
    )
    return randomise(MambaLMHeadModel(config), seed).eval()
