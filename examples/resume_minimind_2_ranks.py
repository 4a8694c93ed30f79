"""Resume a MiniMind run from Colab on two ranks, optimizer and all, and hand it back.

    torchrun --nproc-per-node 2 examples/resume_minimind_2_ranks.py pretrain_512_resume.pth \
        --spec n_heads=8 --spec n_kv_heads=2 --steps 20 --back pretrain_512_back_resume.pth

The file becomes a DCP under Lingua's names, which every rank loads with torch's own calls into a
model that FSDP2 has sharded.  AdamW's moments move with their weights, so the loss goes on where it
was.  In the end the run is saved as a DCP again, and as a file for MiniMind.  For MiniMind's second
and third generation, whose architecture Lingua has too.  Runs on gloo where there are fewer GPUs
than ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from dcpconv.runs.carrying import convert_run
from lingua_model import LinguaModel
from lingua_style_trainer import corpus_batch


def learning_rate(step: int, total: int, peak: float) -> float:
    """MiniMind's schedule: a cosine from the peak to a tenth of it."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))


def carry_over(args: argparse.Namespace) -> None:
    """Rank 0: the resume file as a DCP under Lingua's names, with ``params.json`` beside it."""
    report = convert_run(
        args.source,
        args.work / "resumed",
        to="dcp",
        family="lingua",
        sizes=dict(pair.split("=", 1) for pair in args.spec),
        world_size=dist.get_world_size(),  # the step within the epoch, for so many ranks
        chunks=dist.get_world_size(),  # every rank reads only its own bytes
        overwrite=True,
    )
    for note in report.notes:
        print(f"note: {note}", flush=True)


def go_on(args: argparse.Namespace, device: torch.device) -> None:
    """Resume, train ``args.steps`` steps, save."""
    params = json.loads((args.work / "resumed" / "params.json").read_text())
    model = LinguaModel.from_params(params, max_seqlen=args.seq_len).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optim": moments, "epoch": 0, "step": 0}
    state_dict_loader.load(state, checkpoint_id=args.work / "resumed")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    step = state["step"]
    if dist.get_rank() == 0:
        print(f"resumed at epoch {state['epoch']}, step {step}", flush=True)
    for _ in range(args.steps):
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.total, args.lr)
        tokens = corpus_batch(  # MiniMind's own data would come here
            model.params.vocab_size,
            batch=args.batch,
            seq_len=args.seq_len,
            seed=step * dist.get_world_size() + dist.get_rank(),
        ).to(device)
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step:5d}  loss {mean.item() / dist.get_world_size():.4f}", flush=True)

    weights, moments = get_state_dict(model, optimizer)
    counted = {"epoch": state["epoch"], "step": step, "world_size": dist.get_world_size()}
    target = args.work / f"step-{step}"
    state_dict_saver.save({"model": weights, "optim": moments, **counted}, checkpoint_id=target)
    if dist.get_rank() == 0:
        (target / "params.json").write_text(json.dumps(params))
        if args.back:
            convert_run(target, args.back, to="minimind", family=args.generation, world_size=1)
            print(f"for MiniMind again: {args.back}", flush=True)


def main() -> None:
    """Carry over, go on, hand back."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="MiniMind's *_resume.pth")
    parser.add_argument("--spec", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--generation", default="minimind3", help="minimind2 or minimind3")
    parser.add_argument("--work", type=Path, default=Path("out/minimind"))
    parser.add_argument("--back", type=Path, help="write a file for MiniMind here")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--total", type=int, default=10_000, help="steps of the whole schedule")
    parser.add_argument("--batch", type=int, default=4, help="sentences per rank")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args()

    on_gpu = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        if dist.get_rank() == 0:
            carry_over(args)
        dist.barrier()
        go_on(args, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
