"""A MiniMind-style fine-tuning run with DDP that starts from a Hugging Face directory.

    torchrun --nproc-per-node 2 examples/minimind_finetune_ddp.py weights/Qwen3-0.6B --steps 40

MiniMind spells its parameters as Hugging Face does: MiniMind-2 as Llama, MiniMind-3 as Qwen3 with
norms on q and k.  So any such checkpoint is a place to start from, and what is trained is saved as
MiniMind saves it: a ``.pth`` of half-precision tensors.

Source: jingyaogong/minimind@d65ef2c, ``model/model_minimind.py`` and ``trainer/``.  Written from
the description of the model, without its code.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dcpconv import load_init_weights
from lingua_style_trainer import corpus_batch


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a ``config.json`` says about the shapes."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    eps: float
    theta: float
    tied: bool
    qk_norm: bool

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Sizes:
        """Read a config of transformers 4 or 5."""
        values: dict[str, float] = {k: v for k, v in config.items() if isinstance(v, int | float)}
        rope = config.get("rope_parameters")
        theta = rope["rope_theta"] if isinstance(rope, Mapping) else values.get("rope_theta", 1e4)
        heads = int(values["num_attention_heads"])
        hidden = int(values["hidden_size"])
        return cls(
            vocab=int(values["vocab_size"]),
            hidden=hidden,
            layers=int(values["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(values.get("num_key_value_heads", heads)),
            head_dim=int(values.get("head_dim", hidden // heads)),
            ffn=int(values["intermediate_size"]),
            eps=values["rms_norm_eps"],
            theta=float(theta),
            tied=bool(values.get("tie_word_embeddings", False)),
            qk_norm=config["model_type"] in {"qwen3", "minimind"},
        )


class RMSNorm(nn.Module):
    """Root mean square norm in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide).type_as(x)


class Attention(nn.Module):
    """Causal attention with grouped heads; halves of each head rotate together."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        query, group = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden, query, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, group, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, group, bias=False)
        self.o_proj = nn.Linear(query, sizes.hidden, bias=False)
        if sizes.qk_norm:
            self.q_norm = RMSNorm(sizes.head_dim, sizes.eps)
            self.k_norm = RMSNorm(sizes.head_dim, sizes.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend over ``x`` [batch, seq, hidden]."""

        def heads(linear: nn.Linear) -> Tensor:
            out: Tensor = linear(x).view(*x.shape[:-1], -1, self.sizes.head_dim)
            return out

        q, k, v = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if self.sizes.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (_rotate(t, cos[: x.shape[1], None], sin[: x.shape[1], None]) for t in (q, k))
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.ffn, bias=False)
        self.down_proj = nn.Linear(sizes.ffn, sizes.hidden, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every position by itself."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each on the normed residual stream."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn = Attention(sizes)
        self.input_layernorm = RMSNorm(sizes.hidden, sizes.eps)
        self.post_attention_layernorm = RMSNorm(sizes.hidden, sizes.eps)
        self.mlp = FeedForward(sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Embedding, layers, final norm, and the RoPE tables that no checkpoint has."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, sizes: Sizes, max_seq_len: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.hidden, sizes.eps)
        half = torch.arange(0, sizes.head_dim, 2) / sizes.head_dim
        angle = torch.outer(torch.arange(max_seq_len), 1.0 / sizes.theta**half).repeat(1, 2)
        self.register_buffer("freqs_cos", angle.cos(), persistent=False)
        self.register_buffer("freqs_sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states [batch, seq, hidden]."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.freqs_cos, self.freqs_sin)
        out: Tensor = self.norm(x)
        return out


class MiniMind(nn.Module):
    """The language model, with MiniMind's parameter names."""

    def __init__(self, sizes: Sizes, *, max_seq_len: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = Body(sizes, max_seq_len)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        if sizes.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab]."""
        out: Tensor = self.lm_head(self.model(tokens))
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).type_as(x)


def finetune(args: argparse.Namespace, device: torch.device) -> None:
    """Load, train, save."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = Sizes.of(json.loads((args.source / "config.json").read_text()))
    model = MiniMind(sizes, max_seq_len=args.seq_len).to(device)
    replica = DistributedDataParallel(model)
    report = load_init_weights(replica, args.source)
    if rank == 0:
        print(report, flush=True)
        if args.logits:
            with torch.no_grad():
                tokens = torch.arange(args.seq_len, device=device)[None] % sizes.vocab
                torch.save(model(tokens).float().cpu(), args.logits)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=args.lr)
    for step in range(1, args.steps + 1):
        tokens = corpus_batch(
            sizes.vocab, batch=args.batch, seq_len=args.seq_len, seed=step * world + rank
        ).to(device)
        logits = replica(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss / args.accumulation_steps)
        if step % args.accumulation_steps == 0:
            nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step:4d}  loss {mean.item() / world:.4f}", flush=True)
    if args.save and rank == 0:
        args.save.mkdir(parents=True, exist_ok=True)
        half = {key: tensor.half().cpu() for key, tensor in model.state_dict().items()}
        torch.save(half, args.save / f"full_sft_{sizes.hidden}.pth")


def main() -> None:
    """Set up this rank, and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="Hugging Face directory of a Llama or Qwen3")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="sentences per rank")
    parser.add_argument("--accumulation-steps", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--save", type=Path, help="write full_sft_{hidden}.pth into this directory")
    parser.add_argument("--logits", type=Path, help="write the logits of tokens 0, 1, 2, ... here")
    args = parser.parse_args()

    on_gpu = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        # The DDP wrapper is gone when this returns.  Were it to outlive the process group, it would
        # free gloo while it holds the GIL that gloo's own thread may be waiting for (torch 2.13).
        finetune(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
