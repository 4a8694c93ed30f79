"""Scenes for ``load_scenes``: what does not fit, and files that change or differ by rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dcpconv.loading import moving
from dcpconv.loading.init_weights import load_init_weights
from support.worlds.dist_worlds import Scene
from support.worlds.sharded_models import build, ddp, fsdp2, local_parameters

Read = Literal["auto", "all", "host", "once", "rank0"]


def _own(directory: Path, name: str) -> Path:
    """This rank's copy of a checkpoint."""
    return directory / f"{name}-{dist.get_rank()}-of-{dist.get_world_size()}"


def _without(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    del weights["layers.1.attention.wq.weight"], weights["norm.weight"]
    return weights


def _misshapen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "layers.2.ffn_norm.weight": torch.zeros(95)}


def _surplus(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "layers.0.attention.wq.bias": torch.zeros(96)}


FAULTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "missing": _without,
    "misshapen": _misshapen,
    "unexpected": _surplus,
}


def _fails(source: str, **options: Any) -> Scene:
    """Loading raises, and no weight has changed."""

    def scene(directory: Path) -> Any:
        model = fsdp2()(build(meta=False))
        own = _own(directory, source)
        try:
            load_init_weights(model, own if own.exists() else directory / source, **options)
        finally:
            assert all(tensor.isnan().all() for tensor in local_parameters(model).values())

    return scene


def _shrinks(read: Read, victim: int) -> Scene:
    """A file ends early on one rank once reading has begun: all ranks say so."""

    def scene(directory: Path) -> Any:
        model = ddp(build(meta=False)) if read == "once" else fsdp2()(build(meta=False))
        place = _own(directory, "shrinking")
        original = moving._materialise

        def cut(*args: Any) -> None:
            original(*args)
            if dist.get_rank() == victim:
                for file in place.glob("*.safetensors"):
                    with file.open("r+b") as opened:
                        opened.truncate(4096)

        moving._materialise = cut  # type: ignore[assignment]
        try:
            load_init_weights(model, place, read=read)
        finally:
            moving._materialise = original
            dist.barrier()
            if dist.get_rank() == victim:
                shutil.rmtree(place)
                shutil.copytree(directory / "hf-untied", place)

    return scene


def _garbage(directory: Path) -> Any:
    """A buffer that nobody computes."""
    model = build(meta=True)
    model.layers[1].register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    load_init_weights(fsdp2()(model), directory / "hf-untied")


def _tied(read: Read) -> Scene:
    """Embedding and head are one tensor in the model, and two unlike ones in the source."""

    def scene(directory: Path) -> Any:
        model = build(meta=False)
        model.output.weight = model.tok_embeddings.weight
        load_init_weights(ddp(model), directory / "hf-untied", read=read)

    return scene


def _unlike(**options: Any) -> Scene:
    """The last rank asks for something else."""

    def scene(directory: Path) -> Any:
        is_last = dist.get_rank() == dist.get_world_size() - 1
        load_init_weights(
            fsdp2()(build(meta=False)), directory / "hf-untied", **(options if is_last else {})
        )

    return scene


def hostile(ranks: int) -> dict[str, Scene]:
    """Every way to fail, in a world of a size."""
    return {
        "missing": _fails("missing.pth"),
        "misshapen": _fails("misshapen.pth"),
        "unexpected": _fails("unexpected.pth"),
        "other-family": _fails("other-family"),
        "wrong-table": _fails("hf-untied", to="hf-llama"),
        "no-such-family": _fails("hf-untied", to="llama-lingua"),
        "absent": _fails("nothing/here/at/all"),
        "truncated-on-one-rank": _fails("truncated"),
        "different-on-one-rank": _fails("different"),
        "garbage": _garbage,
        "tied": _tied("all"),
        "tied/rank0": _tied("rank0"),
        "unlike/read": _unlike(read="once"),
        "unlike/engine": _unlike(engine="torch"),
        "unlike/strict": _unlike(strict=False),
        "shrinks/all": _shrinks("all", ranks - 1),
        "shrinks/once": _shrinks("once", ranks - 1),
        "shrinks/rank0": _shrinks("rank0", 0),
    }
