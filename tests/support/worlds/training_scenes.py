"""Scenes for ``dist_worlds``: a run that goes on under every parallelism, from any checkpoint.

Run as a script by ``launch``; ``prepare`` writes what the scenes read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from dcpconv.loading.training_state import load_training_state
from support.versions import save_alone
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.load_faults import Read
from support.worlds.load_scenes import prepare as prepare_weights
from support.worlds.sharded_models import (
    DEVICE,
    VOCAB,
    Wrap,
    build,
    compiled,
    ddp,
    expected,
    fsdp1,
    fsdp2,
    fsdp2_over_tp,
    hsdp,
    offloaded,
    plain,
    tp,
)

WRAPS: dict[int, dict[str, Wrap]] = {
    2: {
        "plain": plain,
        "ddp": ddp,
        "fsdp1-flat": fsdp1(original=False),
        "fsdp1": fsdp1(original=True),
        "fsdp2": fsdp2(),
        "offloaded": offloaded,
        "tp": tp(),
        "compiled": compiled,
    },
    4: {"hsdp": hsdp, "fsdp2-tp": fsdp2_over_tp(uneven=False)},
}
TRAINS = ("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp", "tp")
"""The others compile, or need gradients that torch cannot clip or gather here."""
STEPS = 3


def optimizer_of(model: nn.Module) -> AdamW:
    """What the run trains with; loading must bring back the numbers that it really had."""
    return AdamW(model.parameters(), lr=0.5, betas=(0.5, 0.5), weight_decay=0.3)


def train(model: nn.Module, optimizer: Optimizer, start: int) -> list[float]:
    """Losses of some steps on batches that are the same on every rank."""
    losses = []
    device = next(model.parameters()).device
    for step in range(start, start + STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCAB, (2, 17), generator=generator).to(device)
        logits = model(tokens[:, :-1])
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def prepare(directory: Path) -> None:
    """A run of one process after some steps, and what it goes on to."""
    prepare_weights(directory, ())
    model = expected(directory, device="cpu")
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    train(model, optimizer, 0)
    found: Any = get_state_dict(model, optimizer)
    weights, moments = found
    state = {"model": weights, "optim": moments, "step": STEPS, "epoch": 1}
    save_alone(state, checkpoint_id=directory / "run")
    torch.save({"model": weights, "optim": moments}, directory / "right.pt")
    twice = {
        key: {kind: 2 * value for kind, value in kinds.items()}
        for key, kinds in moments["state"].items()
    }
    other = {"model": weights, "optim": {**moments, "state": twice}}
    save_alone(other, checkpoint_id=directory / "run-twice")
    for name in ("lacking", "strange", "missing-weight"):
        broken: dict[str, Any] = {
            "model": dict(weights),
            "optim": {**moments, "state": dict(moments["state"])},
        }
        first = "layers.1.attention.wq.weight"
        if name == "lacking":
            del broken["optim"]["state"][first]
        elif name == "strange":
            kinds = dict(broken["optim"]["state"][first])
            kinds["momentum_buffer"] = kinds.pop("exp_avg")
            broken["optim"]["state"][first] = kinds
        else:
            del broken["model"]["norm.weight"]
            del broken["optim"]["state"]["norm.weight"]
        save_alone(broken, checkpoint_id=directory / name)
    (directory / "losses.json").write_text(json.dumps(train(model, optimizer, STEPS)))


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    options = StateDictOptions(full_state_dict=True)
    found: Any = get_optimizer_state_dict(model, optimizer, options=options)
    return found["state"]  # type: ignore[no-any-return]


def _resumes(name: str, wrap: Wrap, read: Read) -> Scene:
    """Weights, moments and numbers are those of the run, and so are the next losses."""

    def scene(directory: Path) -> Any:
        model = wrap(build(meta=False))
        optimizer = optimizer_of(model)
        report = load_training_state(model, optimizer, directory / "run", read=read)
        right = torch.load(directory / "right.pt")
        found = _moments(model, optimizer)
        if dist.get_rank() == 0:
            bare = {key.replace("_orig_mod.", ""): kinds for key, kinds in found.items()}
            assert set(bare) == set(right["optim"]["state"])
            for key, kinds in right["optim"]["state"].items():
                for kind, tensor in kinds.items():
                    assert torch.equal(bare[key][kind].cpu(), tensor), (key, kind)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.95), 0.1)
        losses = train(model, optimizer, STEPS) if name in TRAINS else []
        return {
            "losses": losses,
            "bytes": report.weights.nbytes,
            "read": report.weights.nbytes_read,
            "state": len(report.state),
            "kinds": sorted({kind for _, kinds in report.state for kind in kinds}),
            "beside": dict(report.beside),
        }

    return scene


def _goes_on_bit_by_bit(directory: Path) -> Any:
    """A sharded run, saved by torch, goes on in a fresh process group exactly as it would have."""
    model = fsdp2()(expected(directory))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 0)
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optim": moments}, checkpoint_id=directory / "sharded")
    right = train(model, optimizer, STEPS)
    for meta in (False, True):
        fresh = fsdp2()(build(meta=meta))
        again = optimizer_of(fresh)
        load_training_state(fresh, again, directory / "sharded")
        assert train(fresh, again, STEPS) == right
    return right


def _plain_on_meta(directory: Path) -> Any:
    """An optimizer that was built on tensors without memory has those with memory afterwards."""
    model = build(meta=True)
    optimizer = optimizer_of(model)
    load_training_state(model, optimizer, directory / "run")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    return train(model, optimizer, STEPS)


def _fails(source: str, **options: Any) -> Scene:
    """Nothing changes: neither weights nor the optimizer."""

    def scene(directory: Path) -> Any:
        model = fsdp2()(build(meta=False))
        optimizer = optimizer_of(model)
        try:
            load_training_state(model, optimizer, directory / source, **options)
        finally:
            assert all(p.isnan().all() for p in map(_local, model.parameters()) if p.numel())
            assert not optimizer.state
            assert optimizer.param_groups[0]["lr"] == 0.5

    return scene


def _local(parameter: Any) -> Any:
    return parameter.detach().to_local()


def _another_class(directory: Path) -> Any:
    """SGD cannot go on from Adam's moments."""
    model = fsdp2()(build(meta=False))
    load_training_state(model, torch.optim.SGD(model.parameters(), lr=0.1), directory / "run")


def _two_stages(directory: Path) -> Any:
    """Stages of a pipeline, each with the optimizer of its own layers."""
    model = build(meta=True)
    first = dist.get_rank() == 0
    if first:
        del model.norm, model.output
    else:
        del model.tok_embeddings
    kept = range(1) if first else range(1, 3)
    model.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in kept})  # type: ignore[assignment]
    model.to_empty(device=DEVICE)
    optimizer = optimizer_of(model)
    load_training_state(model, optimizer, directory / "run", to="lingua")
    right = torch.load(directory / "right.pt")["optim"]["state"]
    for name, parameter in model.named_parameters():
        for kind, value in right[name].items():
            assert torch.equal(optimizer.state[parameter][kind].cpu(), value), (name, kind)
    return len(optimizer.state)


def _two_groups(directory: Path) -> Any:
    """Pairs of ranks go on with two runs; no moment of one is sent to the other."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = dist.get_rank() // 2
    model = build(meta=False)
    optimizer = optimizer_of(model)
    report = load_training_state(
        model,
        optimizer,
        directory / ("run", "run-twice")[pair],
        process_group=groups[pair],
        read="once",
    )
    right = torch.load(directory / "right.pt")["optim"]["state"]
    for name, parameter in model.named_parameters():
        for kind, value in right[name].items():
            assert torch.equal(optimizer.state[parameter][kind], (1 + pair) * value), (name, kind)
    return report.weights.nbytes_read


SCENES: dict[int, dict[str, Scene]] = {
    ranks: {
        f"resumes/{name}/{read}": _resumes(name, wrap, read)
        for name, wrap in wraps.items()
        for read in (("all", "once") if name in {"ddp", "hsdp", "tp"} else ("all",))
    }
    for ranks, wraps in WRAPS.items()
}
SCENES[2] |= {
    "bit-by-bit": _goes_on_bit_by_bit,
    "plain-on-meta": _plain_on_meta,
    "fails/lacking": _fails("lacking"),
    "fails/strange": _fails("strange"),
    "fails/missing-weight": _fails("missing-weight"),
    "fails/no-optimizer": _fails("dcp-untied"),
    "another-class": _another_class,
    "two-stages": _two_stages,
}
SCENES[4] |= {"two-groups": _two_groups}

if __name__ == "__main__":
    take_part(SCENES)
