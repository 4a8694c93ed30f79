"""The Lingua-style run with tensor parallelism inside FSDP2.

    torchrun --nproc-per-node 4 examples/tp_trainer.py out/llama-lingua --tp 2 --steps 40

Weights are split twice: tensor parallelism gives each rank some heads and some of the feed-forward
width, FSDP2 shards the rows of what is left.  ``load_init_weights()`` reads exactly those pieces,
relabelled from Hugging Face's order if that is what the source has.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

from dcpconv import load_init_weights
from lingua_model import LinguaModel
from lingua_style_trainer import corpus_batch, fixed_batch


def parallelize(model: LinguaModel, mesh: DeviceMesh) -> None:
    """Split heads and feed-forward width over ``tp``, then rows over ``dp``."""
    if model.params.kv_heads % mesh["tp"].size():
        raise SystemExit(f"{model.params.kv_heads} kv heads cannot be split over --tp ranks")
    plan: dict[str, ParallelStyle] = {}
    for number in range(len(model.layers)):
        layer = f"layers.{number}"
        for name in ("attention.wq", "attention.wk", "attention.wv"):
            plan[f"{layer}.{name}"] = ColwiseParallel()
        for name in ("feed_forward.w1", "feed_forward.w3"):
            plan[f"{layer}.{name}"] = ColwiseParallel()
        for name in ("attention.wo", "feed_forward.w2"):
            plan[f"{layer}.{name}"] = RowwiseParallel()
    if isinstance(model.output, nn.Linear):  # a tied head stays with the embedding
        plan["output"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh["tp"], plan)
    for block in model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


def main() -> None:
    """Load and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("source", help="weights to start from: anything that dcpconv opens")
    parser.add_argument("--params", type=Path, help="default: params.json in the source")
    parser.add_argument("--tp", type=int, default=2, help="ranks that share every matrix")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="sentences per data-parallel rank")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--logits", type=Path, help="write the fixed batch's logits, fp32, here")
    args = parser.parse_args()
    params = json.loads((args.params or Path(args.source) / "params.json").read_text())

    # The logits are a view of what tensor parallelism gathered; nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    world = int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= world
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        mesh = init_device_mesh(
            "cuda" if on_gpu else "cpu", (world // args.tp, args.tp), mesh_dim_names=("dp", "tp")
        )
        with torch.device("meta"):
            model = LinguaModel.from_params(params, max_seqlen=args.seq_len)
        parallelize(model, mesh)
        report = load_init_weights(model, args.source)
        # Parameters lie on two meshes, which fused optimizer kernels do not mix.
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, foreach=False)
        device = next(model.parameters()).device
        if dist.get_rank() == 0:
            print(report, flush=True)
        if args.logits:
            with torch.no_grad():
                logits = model(
                    fixed_batch(model.params.vocab_size, seq_len=args.seq_len).to(device)
                )
            if dist.get_rank() == 0:
                torch.save(logits.float().cpu(), args.logits)
        for step in range(1, args.steps + 1):
            # Ranks that share matrices must see the same sentences.
            seed = step * mesh["dp"].size() + mesh["dp"].get_local_rank()
            tokens = corpus_batch(
                model.params.vocab_size, batch=args.batch, seq_len=args.seq_len, seed=seed
            ).to(device)
            logits = model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step:4d}  loss {mean.item() / world:.4f}", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
