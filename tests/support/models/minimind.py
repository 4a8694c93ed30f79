"""MiniMind's four generations, by their parameter names, order, shapes and arithmetic.

Written from the facts, without MiniMind's code.  Inference only: no cache, dropout or auxiliary
loss.

Source: jingyaogong/minimind, ``model/model.py`` until 2025-04, ``model/model_minimind.py`` since.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.models.layers import RMSNorm, angles, attend, rotate

GenerationName = Literal["gen1", "gen2", "gen3", "gen4"]


@dataclass(frozen=True, slots=True)
class Names:
    """How a generation spells its modules."""

    embed: str
    head: str
    attention: str
    q: str
    k: str
    v: str
    o: str
    attention_norm: str
    ffn_norm: str
    ffn: str
    gate: str
    down: str
    up: str


META_NAMES = Names(
    embed="tok_embeddings",
    head="output",
    attention="attention",
    q="wq",
    k="wk",
    v="wv",
    o="wo",
    attention_norm="attention_norm",
    ffn_norm="ffn_norm",
    ffn="feed_forward",
    gate="w1",
    down="w2",
    up="w3",
)
HF_NAMES = Names(
    embed="embed_tokens",
    head="lm_head",
    attention="self_attn",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="o_proj",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    ffn="mlp",
    gate="gate_proj",
    down="down_proj",
    up="up_proj",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one generation fixes.

    Attributes:
        inner: Module that holds everything but the head; empty where there is none.
        interleaved: RoPE pairs neighbours; otherwise halves.
        theta: RoPE base; in no ``.pth``.
        eps: Of every norm; in no ``.pth``.
        qk_norm: Queries and keys are normed per head, before RoPE.
        shared: How shared experts are named: by no index, by an index, or there are none.
        norm_top1: A single chosen expert's weight is made one, as sums over several are.
        half: The trainers store fp16, each of a tied pair by itself.
    """

    names: Names
    inner: str
    interleaved: bool
    theta: float
    eps: float
    qk_norm: bool
    shared: Literal["one", "list", "none"]
    norm_top1: bool
    half: bool


GENERATIONS: dict[GenerationName, Generation] = {
    "gen1": Generation(
        names=META_NAMES,
        inner="",
        interleaved=True,
        theta=1e4,
        eps=1e-5,
        qk_norm=False,
        shared="one",
        norm_top1=False,
        half=False,
    ),
    "gen2": Generation(
        names=META_NAMES,
        inner="",
        interleaved=True,
        theta=1e6,
        eps=1e-5,
        qk_norm=False,
        shared="one",
        norm_top1=False,
        half=False,
    ),
    "gen3": Generation(
        names=HF_NAMES,
        inner="model",
        interleaved=False,
        theta=1e6,
        eps=1e-5,
        qk_norm=False,
        shared="list",
        norm_top1=False,
        half=True,
    ),
    "gen4": Generation(
        names=HF_NAMES,
        inner="model",
        interleaved=False,
        theta=1e6,
        eps=1e-6,
        qk_norm=True,
        shared="none",
        norm_top1=True,
        half=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniMindConfig:
    """Sizes of one model; the defaults hold no power of two that could hide a swapped axis.

    Attributes:
        experts: Routed experts; 0 for a dense model.
        shared_experts: Of a model with experts, where its generation has them.
        mask: Store a causal mask per layer, as some files of the first generation do.
    """

    generation: GenerationName
    dim: int = 96
    n_layers: int = 3
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 16
    ffn_dim: int = 152
    vocab_size: int = 131
    experts: int = 0
    top_k: int = 2
    shared_experts: int = 1
    tied: bool = True
    mask: bool = False
    max_seqlen: int = 64

    @property
    def facts(self) -> Generation:
        return GENERATIONS[self.generation]


class Attention(nn.Module):
    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        names = config.facts.names
        query, group = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.add_module(names.q, nn.Linear(config.dim, query, bias=False))
        self.add_module(names.k, nn.Linear(config.dim, group, bias=False))
        self.add_module(names.v, nn.Linear(config.dim, group, bias=False))
        self.add_module(names.o, nn.Linear(query, config.dim, bias=False))
        if config.facts.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.facts.eps)
            self.k_norm = RMSNorm(config.head_dim, config.facts.eps)
        if config.mask:
            full = torch.full((1, 1, config.max_seqlen, config.max_seqlen), float("-inf"))
            self.register_buffer("mask", full.triu(1))

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        facts = self.config.facts
        q, k, v = (
            self.get_submodule(name)(x).view(*x.shape[:-1], -1, self.config.head_dim)
            for name in (facts.names.q, facts.names.k, facts.names.v)
        )
        if facts.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(t, angle, interleaved=facts.interleaved) for t in (q, k))
        out: Tensor = self.get_submodule(facts.names.o)(attend(q, k, v))
        return out


class FeedForward(nn.Module):
    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.names = config.facts.names
        self.add_module(self.names.gate, nn.Linear(config.dim, config.ffn_dim, bias=False))
        self.add_module(self.names.down, nn.Linear(config.ffn_dim, config.dim, bias=False))
        self.add_module(self.names.up, nn.Linear(config.dim, config.ffn_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.get_submodule(name)(x) for name in (self.names.gate, self.names.up))
        out: Tensor = self.get_submodule(self.names.down)(functional.silu(gate) * up)
        return out


class Experts(nn.Module):
    """Softmax over all experts, then the best ``top_k``; shared experts are added ungated."""

    shared_experts: nn.Module

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        gate = nn.Linear(config.dim, config.experts, bias=False)
        experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))
        router_first = config.facts.shared == "none"
        self.add_module(*(("gate", gate) if router_first else ("experts", experts)))
        self.add_module(*(("experts", experts) if router_first else ("gate", gate)))
        self.shared: tuple[nn.Module, ...] = ()
        if config.facts.shared == "one" and config.shared_experts:
            self.shared_experts = FeedForward(config)
        elif config.facts.shared == "list":
            self.shared_experts = nn.ModuleList(
                FeedForward(config) for _ in range(config.shared_experts)
            )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.get_submodule("gate")(x).softmax(-1)
        weight, chosen = scores.topk(self.config.top_k, dim=-1)
        if self.config.top_k > 1 or self.config.facts.norm_top1:
            weight = weight / weight.sum(-1, keepdim=True)
        # Every expert sees every token: plain, and fast enough for a handful of tiny experts.
        share = torch.zeros_like(scores).scatter(-1, chosen, weight)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.get_submodule("experts").children()):
            out = out + share[..., index : index + 1] * expert(x)
        if self.config.facts.shared == "one" and self.config.shared_experts:
            out = out + self.shared_experts(x)
        elif self.config.facts.shared == "list":
            for expert in self.shared_experts.children():
                out = out + expert(x)
        return out


class Block(nn.Module):
    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        names, eps = config.facts.names, config.facts.eps
        self.names = names
        self.add_module(names.attention, Attention(config))
        self.add_module(names.attention_norm, RMSNorm(config.dim, eps))
        self.add_module(names.ffn_norm, RMSNorm(config.dim, eps))
        self.add_module(names.ffn, Experts(config) if config.experts else FeedForward(config))

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        normed = self.get_submodule(self.names.attention_norm)(x)
        x = x + self.get_submodule(self.names.attention)(normed, angle)
        normed = self.get_submodule(self.names.ffn_norm)(x)
        out: Tensor = x + self.get_submodule(self.names.ffn)(normed)
        return out


class MiniMind(nn.Module):
    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        facts = config.facts
        inner: nn.Module = self
        if facts.inner:
            inner = nn.Module()
            self.add_module(facts.inner, inner)
        embed = nn.Embedding(config.vocab_size, config.dim)
        inner.add_module(facts.names.embed, embed)
        inner.add_module("layers", nn.ModuleList(Block(config) for _ in range(config.n_layers)))
        inner.add_module("norm", RMSNorm(config.dim, facts.eps))
        head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.add_module(facts.names.head, head)
        if config.tied:
            embed.weight = head.weight
        angle = angles(config.max_seqlen, config.head_dim, facts.theta)
        if facts.interleaved:
            turns = torch.polar(torch.ones_like(angle), angle)
            inner.register_buffer("pos_cis", turns, persistent=False)
        else:
            twice = torch.cat((angle, angle), -1)
            inner.register_buffer("freqs_cos", twice.cos(), persistent=False)
            inner.register_buffer("freqs_sin", twice.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of ``tokens`` [batch, seq]."""
        facts = self.config.facts
        angle = angles(tokens.shape[1], self.config.head_dim, facts.theta)
        inner = self.get_submodule(facts.inner)
        x = inner.get_submodule(facts.names.embed)(tokens)
        for layer in inner.get_submodule("layers").children():
            x = layer(x, angle)
        out: Tensor = self.get_submodule(facts.names.head)(inner.get_submodule("norm")(x))
        return out


def save_pth(model: MiniMind, path: Path) -> None:
    """Write what the trainers of this generation write.

    Generations 1 and 2 store ``state_dict()`` as it is, fp32 with a shared storage for the tied
    pair; 3 and 4 store ``{key: value.half()}``, which makes two tensors of the pair.
    """
    state = model.state_dict()
    if model.config.facts.half:
        torch.save({key: value.half() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
