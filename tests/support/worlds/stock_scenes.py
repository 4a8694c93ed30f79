"""Scenes for ``dist_worlds``: both engines, models with hooks, and ranks with other parts.

Run as a script by ``launch``; ``prepare`` of ``load_scenes`` and of this module write what the
scenes read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dcpconv.loading.init_weights import load_init_weights
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.load_scenes import WRAPS
from support.worlds.sharded_models import (
    DEVICE,
    LAYERS,
    Wrap,
    build,
    expected,
    fsdp2,
    local_tensors,
    plain,
)

HOOKED: dict[str, Wrap] = {"plain": plain, "fsdp2": fsdp2()}
EXPERTS = 4


def prepare_experts(directory: Path) -> None:
    """A checkpoint of experts that no table knows, in stored order."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        f"experts.{n}.w.weight": torch.randn(5, 7, generator=generator) for n in range(EXPERTS)
    }
    torch.save({**weights, "router.weight": torch.randn(EXPERTS, 7)}, directory / "experts.pt")


def _equal(found: nn.Module, right: nn.Module) -> None:
    ours, theirs = local_tensors(found), local_tensors(right)
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def _stock(wrap: Wrap, *, meta: bool) -> Scene:
    """``engine="torch"`` gives the shards that torch makes of the right weights."""

    def scene(directory: Path) -> Any:
        model = wrap(build(meta=meta))
        device = DEVICE if wrap is plain else None
        report = load_init_weights(model, directory / "hf-untied", engine="torch", device=device)
        _equal(model, wrap(expected(directory)))
        return {"engine": report.engine, "notes": report.notes, "tensors": len(report.loaded)}

    return scene


def _tied(directory: Path) -> Any:
    """A tied head whose hooks make a copy of it: the copy has not been loaded, and must not win."""

    def copies(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        key = f"{prefix}output.tied_module.weight"
        state[key] = state[key] * 1

    bare: Any = build(meta=True, tied=True)
    bare.register_state_dict_post_hook(copies)
    model = fsdp2()(bare)
    report = load_init_weights(model, directory / "hf-tied")
    _equal(model, fsdp2()(expected(directory, tied=True)))
    return {"engine": report.engine, "tied": report.tied}


def _as_thirds(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What a module writes that keeps a third of its weights: only its hooks can undo it."""
    key = f"{prefix}weight"
    state[key] = state[key] * 3


def _from_thirds(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    key = f"{prefix}weight"
    if key in state:
        state[key] = state[key] / 3


def _hook(model: nn.Module) -> None:
    norm: Any = model.get_submodule("norm")
    norm.register_state_dict_post_hook(_as_thirds)
    norm.register_load_state_dict_pre_hook(_from_thirds)


def _hooked(wrap: Wrap, engine: Any) -> Scene:
    def scene(directory: Path) -> Any:
        model = build(meta=True)
        _hook(model)
        model = wrap(model)  # type: ignore[assignment]
        report = load_init_weights(model, directory / "hf-untied", engine=engine)
        right = expected(directory)
        if report.engine == "torch":
            with torch.no_grad():
                right.norm.weight.div_(3)
        _equal(model, wrap(right))
        return {"engine": report.engine, "notes": report.notes}

    return scene


def _hooked_on_one_rank(directory: Path) -> Any:
    """Pipeline stages of which one has hooks: all ranks take the stock path."""
    model = _stage(build(meta=True))
    if dist.get_rank() == 1:
        _hook(model)
    report = load_init_weights(model, directory / "hf-untied", to="lingua")
    right = _stage(expected(directory))
    if dist.get_rank() == 1:
        with torch.no_grad():
            right.get_parameter("norm.weight").div_(3)
    found = dict(model.named_parameters())
    for key, tensor in right.named_parameters():
        assert torch.equal(found[key], tensor), key
    return {"engine": report.engine, "loaded": len(report.loaded)}


def _stage(model: Any) -> nn.Module:
    """The part of a model that a rank of a pipeline has."""
    first = dist.get_rank() == 0
    if first:
        del model.norm, model.output
    else:
        del model.tok_embeddings
    kept = range(1) if first else range(1, LAYERS)
    model.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in kept})
    made: nn.Module = model
    return made


class Experts(nn.Module):
    """The router, and those experts that a rank of an expert-parallel group has."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.router = nn.Linear(7, EXPERTS, bias=False)
            mine = range(dist.get_rank(), EXPERTS, dist.get_world_size())
            self.experts = nn.ModuleDict(
                {str(n): nn.ModuleDict({"w": nn.Linear(7, 5, bias=False)}) for n in mine}
            )


def _experts(engine: Any) -> Scene:
    """Every rank has other experts and the same router, which FSDP2 shards."""

    def scene(directory: Path) -> Any:
        model = Experts()
        fully_shard(model.router)
        report = load_init_weights(model, directory / "experts.pt", engine=engine)
        right = torch.load(directory / "experts.pt")
        for key, tensor in model.named_parameters():
            found: Any = tensor
            whole = found.full_tensor() if hasattr(found, "full_tensor") else found
            assert torch.equal(whole, right[key]), key
        return sorted(report.loaded)

    return scene


def _nobody_has(directory: Path) -> Any:
    """A key that no rank has a place for is unexpected, though each misses others."""
    model = Experts()
    if dist.get_rank() == 1:
        del model.experts["1"]
    load_init_weights(model, directory / "experts.pt")


def _misses_one(directory: Path) -> Any:
    """An expert that the checkpoint lacks, on one rank: one verdict."""
    model = Experts()
    if dist.get_rank() == 1:
        model.experts["9"] = nn.ModuleDict({"w": nn.Linear(7, 5, bias=False)})
    load_init_weights(model, directory / "experts.pt")


def _added_after_wrapping(engine: Any) -> Scene:
    """A parameter that FSDP2 does not know of, registered once the model was wrapped."""

    def scene(directory: Path) -> Any:
        model = fsdp2()(build(meta=True))
        extra = nn.Parameter(torch.empty(3))
        model.register_parameter("extra", extra)
        seen: list[str] = []

        def fill(fqn: str, tensor: Tensor) -> None:
            seen.append(fqn)
            tensor.fill_(7)

        load_init_weights(
            model,
            directory / "hf-untied",
            to="lingua",
            strict=False,
            init_missing=fill,
            engine=engine,
        )
        assert model.get_parameter("extra") is extra
        assert extra.eq(7).all()
        return seen

    return scene


def _group(engine: Any) -> Scene:
    """Every rank in a group of its own loads another checkpoint."""

    def scene(directory: Path) -> Any:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        mine = dist.get_rank()
        source = "hf-untied" if mine == 0 else "other-values"
        model = build(meta=True)
        load_init_weights(model, directory / source, process_group=groups[mine], engine=engine)
        right = expected(directory)
        if mine:
            with torch.no_grad():
                right.norm.weight.add_(1)
        _equal(model, right)

    return scene


def _pairs(**options: Any) -> Scene:
    """Two groups of two load two checkpoints, and nothing travels from one to the other."""

    def scene(directory: Path) -> Any:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        pair = dist.get_rank() // 2
        source = ("hf-untied", "other-values")[pair]
        model = build(meta=True)
        load_init_weights(model, directory / source, process_group=groups[pair], **options)
        right = expected(directory)
        if pair:
            with torch.no_grad():
                right.norm.weight.add_(1)
        _equal(model, right)

    return scene


def _foreign_group(directory: Path) -> Any:
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        load_init_weights(build(meta=True), directory / "hf-untied", process_group=group)


def _other_values(**options: Any) -> Scene:
    """The same shapes and sizes, other values on the last rank: nothing is loaded."""

    def scene(directory: Path) -> Any:
        model = fsdp2()(build(meta=False))
        is_last = dist.get_rank() == dist.get_world_size() - 1
        try:
            load_init_weights(
                model, directory / ("other-values" if is_last else "hf-untied"), **options
            )
        finally:
            weights = {k: t for k, t in local_tensors(model).items() if "rope" not in k}
            assert all(tensor.isnan().all() for tensor in weights.values())

    return scene


SCENES: dict[int, dict[str, Scene]] = {
    ranks: {f"stock/{name}": _stock(wrap, meta=metas[0]) for name, (wrap, metas) in wraps.items()}
    for ranks, wraps in WRAPS.items()
}
SCENES[2] |= {
    **{
        f"hooked/{name}/{engine}": _hooked(wrap, engine)
        for name, wrap in HOOKED.items()
        for engine in ("auto", "direct", "torch")
    },
    "tied": _tied,
    "hooked-on-one-rank": _hooked_on_one_rank,
    **{f"experts/{engine}": _experts(engine) for engine in ("direct", "torch")},
    "nobody-has": _nobody_has,
    "misses-one": _misses_one,
    **{f"added/{engine}": _added_after_wrapping(engine) for engine in ("direct", "torch")},
    **{f"group/{engine}": _group(engine) for engine in ("direct", "torch")},
    "foreign-group": _foreign_group,
    "other-values/direct": _other_values(),
    "other-values/torch": _other_values(engine="torch"),
}
SCENES[4] |= {
    "pairs/all": _pairs(read="all"),
    "pairs/once": _pairs(read="once"),
    "pairs/rank0": _pairs(read="rank0"),
    "pairs/torch": _pairs(engine="torch"),
}

if __name__ == "__main__":
    take_part(SCENES)
