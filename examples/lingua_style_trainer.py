"""A Lingua-style training run that starts from converted weights.

    torchrun --nproc-per-node 2 examples/lingua_style_trainer.py out/llama-lingua --steps 40

The model is built on the meta device, sharded with FSDP2 and filled by ``load_init_weights()``: no
rank ever holds it whole.  Then come a few real AdamW steps on a small synthetic corpus.  Runs on
gloo where there are fewer GPUs than ranks, else on NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from dcpconv import load_init_weights, save_weights
from lingua_model import LinguaModel

ALPHABET = 61
"""Distinct tokens of the corpus: few enough to learn in a minute."""


def fixed_batch(vocab_size: int, *, seq_len: int = 64) -> Tensor:
    """The token ids [2, seq_len] that ``--logits`` is computed for."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocab_size, (2, seq_len), generator=generator)


def corpus_batch(vocab_size: int, *, batch: int, seq_len: int, seed: int) -> Tensor:
    """Sentences [batch, seq_len + 1] of a language in which a token mostly decides the next one."""
    words = torch.linspace(0, vocab_size - 1, ALPHABET).long()
    successor = torch.randperm(ALPHABET, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    now = torch.randint(0, ALPHABET, (batch,), generator=generator)
    columns = [now]
    for _ in range(seq_len):
        surprise = torch.rand(batch, generator=generator) < 0.1
        other = torch.randint(0, ALPHABET, (batch,), generator=generator)
        now = torch.where(surprise, other, successor[now])
        columns.append(now)
    return words[torch.stack(columns, 1)]


def build(params_file: Path, *, seq_len: int) -> LinguaModel:
    """The model of a ``params.json``, on the meta device and sharded: a group per layer."""
    params = json.loads(params_file.read_text())
    with torch.device("meta"):
        model = LinguaModel.from_params(params, max_seqlen=seq_len)
    device_type = "cuda" if torch.cuda.device_count() >= dist.get_world_size() else "cpu"
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: LinguaModel, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
    """Take ``args.steps`` steps; rank 0 prints the mean loss of every one.

    Every ``args.hf_every`` steps all ranks together write the model as Hugging Face has it.
    """
    device = next(model.parameters()).device
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(1, args.steps + 1):
        tokens = corpus_batch(
            model.params.vocab_size,
            batch=args.batch,
            seq_len=args.seq_len,
            seed=step * world + rank,
        ).to(device)
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step:4d}  loss {mean.item() / world:.4f}", flush=True)
        if args.save_hf and step % args.hf_every == 0:
            save_weights(model, args.save_hf / f"step-{step}", to="hf", assets=args.params)


def save(model: LinguaModel, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
    """Write a step directory as Lingua does: ``{"model", "optim"}`` and ``params.json``."""
    weights, moments = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optim": moments}, checkpoint_id=args.save)
    if dist.get_rank() == 0:
        (args.save / "params.json").write_text(args.params.read_text())


def main() -> None:
    """Load, dump logits, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("source", help="weights to start from: anything that dcpconv opens")
    parser.add_argument("--params", type=Path, help="default: params.json in the source")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="sentences per rank")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--logits", type=Path, help="write the fixed batch's logits, fp32, here")
    parser.add_argument("--save", type=Path, help="write model and optimizer into this directory")
    parser.add_argument("--save-hf", type=Path, help="write Hugging Face directories in here")
    parser.add_argument("--hf-every", type=int, default=10, help="after so many steps each")
    args = parser.parse_args()
    args.params = args.params or Path(args.source) / "params.json"

    on_gpu = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        model = build(args.params, seq_len=args.seq_len)
        load_init_weights(model, args.source)
        # Before the first forward pass: after it, the root's parameters are the gathered ones.
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
        device = next(model.parameters()).device
        if args.logits:
            tokens = fixed_batch(model.params.vocab_size, seq_len=args.seq_len).to(device)
            with torch.no_grad():
                logits = model(tokens)
            if dist.get_rank() == 0:
                torch.save(logits.float().cpu(), args.logits)
        train(model, optimizer, args)
        if args.save:
            save(model, optimizer, args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
