"""torchtitan's Llama 3 and Qwen3, by their parameter names, shapes and arithmetic.

Written from the facts, without torchtitan's code.  Inference only, in the dtype of the weights:
torchtitan itself multiplies grouped experts in bf16 whatever their dtype is.

Source: torchtitan 0.2.2 and 0.3.0, ``models/{llama3,qwen3}`` and their attention, RoPE and MoE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.models.layers import RMSNorm, angles, attend, rotate

Release = Literal["0.2", "0.3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TitanConfig:
    """What decides names, shapes and arithmetic.

    Attributes:
        release: Whose names: 0.3 moved the projections, renamed the head and the experts.
        is_qwen: Qwen3: heads are normalised and turn by halves; Llama 3's turn neighbours.
        dense_layers: Layers without experts, where the others have some.
        scaling: Llama 3.1's stretching of RoPE: its factor, the low and high frequency factors, and
            the positions it was first trained for.
        balances: Whether a bias that load balancing moves takes part in choosing experts.
    """

    release: Release = "0.3"
    is_qwen: bool = False
    dim: int = 96
    n_layers: int = 3
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 16
    hidden_dim: int = 152
    vocab_size: int = 131
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    scaling: tuple[float, float, float, int] | None = None
    enable_weight_tying: bool = False
    num_experts: int = 0
    top_k: int = 2
    moe_hidden_dim: int = 52
    dense_layers: tuple[int, ...] = ()
    balances: bool = True


class Attention(nn.Module):
    def __init__(self, config: TitanConfig) -> None:
        super().__init__()
        self.config = config
        widths = {"wq": config.n_heads, "wk": config.n_kv_heads, "wv": config.n_kv_heads}
        at = nn.Module() if config.release == "0.3" else self
        for name, heads in widths.items():
            at.add_module(name, nn.Linear(config.dim, heads * config.head_dim, bias=False))
        if at is not self:
            self.qkv_linear = at
        self.projections = [at.get_submodule(name) for name in widths]
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        if config.is_qwen:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.config.head_dim)) for linear in self.projections
        )
        if self.config.is_qwen:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(t, angle, interleaved=not self.config.is_qwen) for t in (q, k))
        out: Tensor = self.wo(attend(q, k, v))
        return out


class FeedForward(nn.Module):
    def __init__(self, config: TitanConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


class GroupedExperts(nn.Module):
    """Three stacked matrices: [expert, out, in]."""

    def __init__(self, config: TitanConfig) -> None:
        super().__init__()
        wide = (config.num_experts, config.moe_hidden_dim, config.dim)
        down = (config.num_experts, config.dim, config.moe_hidden_dim)
        late = config.release == "0.3"
        shapes = {"w1_EFD" if late else "w1": wide, "w2_EDF" if late else "w2": down}
        shapes["w3_EFD" if late else "w3"] = wide
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        w1, w2, w3 = (weight[expert] for weight in self.parameters())
        return (functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


class MoE(nn.Module):
    """Softmax over all experts; the chosen ones' shares are scaled to a sum of one.

    The bias takes part in choosing and in nothing else.
    """

    def __init__(self, config: TitanConfig) -> None:
        super().__init__()
        self.config = config
        late = config.release == "0.3"
        self.bias_name = "expert_bias_E" if late else "expert_bias"
        if config.balances:
            self.register_buffer(self.bias_name, torch.zeros(config.num_experts))
        counter = torch.zeros(config.num_experts)
        self.register_buffer("tokens_per_expert_E" if late else "tokens_per_expert", counter, False)
        self.router = nn.Module()
        self.router.gate = nn.Linear(config.dim, config.num_experts, bias=False)
        self.grouped = [GroupedExperts(config)]
        if late:
            self.routed_experts = nn.Module()
            self.routed_experts.inner_experts = self.grouped[0]
        else:
            self.experts = self.grouped[0]

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router.get_submodule("gate")(x).softmax(-1)
        judged = scores + self.get_buffer(self.bias_name) if self.config.balances else scores
        chosen = judged.topk(self.config.top_k, -1).indices
        share = scores.gather(-1, chosen)
        share = share / share.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(self.config.num_experts):
            weight = (share * (chosen == expert)).sum(-1, keepdim=True)
            out = out + weight * self.grouped[0](x, expert)
        return out


class Block(nn.Module):
    def __init__(self, config: TitanConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        has_experts = config.num_experts > 0 and layer not in config.dense_layers
        if has_experts:
            self.moe = MoE(config)
        else:
            self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_name = "moe" if has_experts else "feed_forward"

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angle)
        out: Tensor = x + self.get_submodule(self.ffn_name)(self.ffn_norm(x))
        return out


def _stretch(frequency: Tensor, factor: float, low: float, high: float, trained: int) -> Tensor:
    """Factor on each frequency: waves longer than the first training saw are slowed down, short
    ones are not, and those between in proportion."""
    waves = trained * frequency / (2 * torch.pi)  # that fit into the first training's length
    share = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - share) / factor + share


class Titan(nn.Module):
    """A model of torchtitan; layers are numbered keys of a ``ModuleDict``."""

    def __init__(self, config: TitanConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(n): Block(config, n) for n in range(config.n_layers)})
        self.norm = RMSNorm(config.dim, config.norm_eps)
        head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.enable_weight_tying:
            head.weight = self.tok_embeddings.weight
        self.head_name = "lm_head" if config.release == "0.3" else "output"
        self.add_module(self.head_name, head)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of ``tokens`` [batch, seq]."""
        angle = angles(tokens.shape[1], self.config.head_dim, self.config.rope_theta)
        if self.config.scaling is not None:
            angle = angle * _stretch(angle[1], *self.config.scaling)
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x, angle)
        out: Tensor = self.get_submodule(self.head_name)(self.norm(x))
        return out
