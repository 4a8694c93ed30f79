"""Scenes for ``dist_worlds``: ranks save what they hold, and what ``convert`` makes of torch's DCP.

Run as a script by ``launch``; ``prepare`` of ``load_scenes`` writes the config that they name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dcpconv import CheckpointWriter, convert, save_weights
from dcpconv.conversion.saving import gathering
from dcpconv.conversion.saving.writing import write_share
from support.models.hf_models import tiny
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.load_scenes import WRAPS
from support.worlds.sharded_models import DEVICE, Wrap, expected, fsdp2, hsdp

FORMS: dict[str, dict[str, Any]] = {
    "hf": {"to": "hf"},
    "hf-small-files": {"to": "hf", "max_file_size": 60_000},
    "hf-bf16": {"to": "hf", "dtype": "bf16"},
    "lingua-dcp": {"form": "dcp", "to": "lingua", "root": "model"},
    "meta.pth": {"form": "torch", "to": "meta"},
}
"""By name of the result: what ``save_weights`` and ``convert`` are asked for."""


IN_EVERY_FORM = ("plain", "fsdp2", "fsdp2-tied", "tp", "hsdp", "fsdp2-tp-uneven")
"""Models that are saved in all of them; the others are saved as hf."""


def place(directory: Path, kind: str, name: str) -> Path:
    """Where a scene in a world of this size leaves something."""
    path = directory / f"{kind}-{dist.get_world_size()}" / name
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return path


def _saves(name: str, wrap: Wrap, *, tied: bool = False) -> Scene:
    """Every form of a model, by its ranks and by ``convert``."""

    def scene(directory: Path) -> Any:
        model = wrap(expected(directory, tied=tied))
        config = directory / ("hf-tied" if tied else "hf-untied")
        stock = place(directory, "stock", name)
        state_dict_saver.save({"model": get_model_state_dict(model)}, checkpoint_id=stock)
        heard = {}
        for form, options in FORMS.items():
            if form != "hf" and name not in IN_EVERY_FORM:
                continue
            target = place(directory, f"saved-{form}", name + Path(form).suffix)
            report = save_weights(model, target, assets=config, **options)
            heard[form] = {"tensors": report.target.tensors, "written": not report.is_dry_run}
            if dist.get_rank() == 0:
                again = directory / f"converted-{form}-{dist.get_world_size()}" / target.name
                again.parent.mkdir(parents=True, exist_ok=True)
                convert(stock, again, assets=config, **({"form": "hf"} | options))
        return heard

    return scene


def _live(directory: Path) -> Any:
    """A model of transformers, whose config comes with it."""
    model = tiny("llama", tie_word_embeddings=True).to(DEVICE)
    tokens = torch.arange(12, device=DEVICE)[None]
    logits = model(tokens).logits
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    target = place(directory, "live", "hf")
    save_weights(model, target)
    if dist.get_rank() == 0:
        torch.save(logits.cpu(), directory / "live.pt")
    return sorted(path.name for path in target.iterdir())


def _by_dcp(directory: Path) -> Any:
    """The whole state of a trainer through ``dcp.save``, step by step with one writer."""
    model = fsdp2()(expected(directory))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.arange(12, device=DEVICE)[None]).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    writer = CheckpointWriter(to="hf", only="model", assets=directory / "hf-untied")
    left = []
    for step in (1, 2):
        target = place(directory, "steps", f"step-{step}")
        state = {"model": weights, "optim": moments, "step": step}
        state_dict_saver.save(state, checkpoint_id=target, storage_writer=writer)
        assert writer.report is not None
        left.append(writer.report.target.path)
    stock = place(directory, "steps", "stock")
    state_dict_saver.save(state, checkpoint_id=stock)
    return left


def _async(directory: Path) -> Any:
    """Staged on the CPU, and saved while training goes on."""
    model = fsdp2()(expected(directory))
    target = place(directory, "async", "hf")
    writer = CheckpointWriter(target, to="hf", assets=directory / "hf-untied")
    future = state_dict_saver.async_save(
        {"model": get_model_state_dict(model)}, storage_writer=writer
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert not hasattr(future, "upload_completion")
    future.result()
    return True


def _overwrites(directory: Path) -> Any:
    model = fsdp2()(expected(directory))
    target = place(directory, "overwritten", "hf")
    options: dict[str, Any] = {"to": "hf", "assets": directory / "hf-untied"}
    save_weights(model, target, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_weights(model, target, overwrite=True, **options)
    save_weights(model, target, **options)  # raises
    return None


def _without_config(directory: Path) -> Any:
    save_weights(fsdp2()(expected(directory)), place(directory, "nothing", "hf"), to="hf")


def _misfit(directory: Path) -> Any:
    config = directory / "other-family"
    model = fsdp2()(expected(directory))
    save_weights(model, place(directory, "misfit", "hf"), to="hf", assets=config)


def _overflows(directory: Path) -> Any:
    model = expected(directory)
    with torch.no_grad():
        model.get_parameter("layers.1.attention.wo.weight")[-1, -1] = 1e6
    options: dict[str, Any] = {"to": "hf", "assets": directory / "hf-untied", "dtype": "fp16"}
    save_weights(fsdp2()(model), place(directory, "overflow", "hf"), **options)


def _unequal_ties(directory: Path) -> Any:
    """Two tensors under names that the config says are one."""
    model = tiny("llama", tie_word_embeddings=True).to(DEVICE)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    fully_shard(model)
    save_weights(model, place(directory, "ties", "hf"))


def _apart(directory: Path) -> Any:
    """The same, said so."""
    model = tiny("llama", tie_word_embeddings=True).to(DEVICE)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    fully_shard(model)
    report = save_weights(model, place(directory, "apart", "hf"), spec="tied=false")
    return report.target.tensors


def _fails(directory: Path) -> Any:
    """The last rank fails after it has written half of its part."""
    model = fsdp2()(expected(directory))
    target = place(directory, "fails", "hf")
    is_last = dist.get_rank() == dist.get_world_size() - 1

    def half(share: Any, **options: Any) -> Any:
        write_share(share, **options)
        if is_last:
            raise OSError(5, "Input/output error", "a disk")
        return ()

    with patch("dcpconv.conversion.saving.storage_writer.write_share", half):
        save_weights(model, target, to="hf", assets=directory / "hf-untied")


def _objects(directory: Path) -> Any:
    model = fsdp2()(expected(directory))
    state = {"model": get_model_state_dict(model), "step": 3}
    writer = CheckpointWriter(place(directory, "objects", "dcp"), form="dcp")
    return _failure(state, writer)


def _failure(state: dict[str, Any], writer: CheckpointWriter, planner: Any = None) -> str:
    try:
        state_dict_saver.save(state, storage_writer=writer, planner=planner)
    except CheckpointException as error:
        return str(error.failures[min(error.failures)][0])
    return ""


def _cached(directory: Path) -> Any:
    """A planner that says nothing the second time."""
    model = fsdp2()(expected(directory))
    state = {"model": get_model_state_dict(model)}
    planner = DefaultSavePlanner(enable_plan_caching=True)
    config = directory / "hf-untied"
    said = []
    for step in (1, 2):
        writer = CheckpointWriter(place(directory, "cached", str(step)), to="hf", assets=config)
        said.append(_failure(state, writer, planner))
    return said


def _half_of_the_ranks(directory: Path) -> Any:
    """Two of four save by themselves."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("half", "shard"))
    model = fsdp2(mesh["shard"])(expected(directory))
    target = place(directory, "halves", "x").parent / f"hf-{mine}"
    report = save_weights(
        model, target, to="hf", assets=directory / "hf-untied", process_group=groups[mine]
    )
    return report.target.tensors


def _bytes_written(directory: Path) -> Any:
    """Bytes that this rank has put into files, and those that it holds."""
    model = hsdp(expected(directory))
    written: list[int] = []
    target = place(directory, "counted", "hf")
    config = directory / "hf-untied"
    save_weights(model, target, to="hf", assets=config, progress=written.append)
    held = sum(
        p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters()
    )
    return {"written": sum(written), "held": held}


def _whole_files(directory: Path) -> Any:
    """One writer per file, in windows that cut tensors, elements and headers."""
    with patch.object(gathering, "WINDOW", 1000):
        return _in_windows(directory)


def _in_windows(directory: Path) -> Any:
    model = WRAPS[dist.get_world_size()]["fsdp2"][0](expected(directory))
    heard = {}
    for form, options in FORMS.items():
        target = place(directory, f"whole-{form}", "fsdp2" + Path(form).suffix)
        written: list[int] = []
        save_weights(
            model,
            target,
            assets=directory / "hf-untied",
            whole_files=True,
            progress=written.append,
            **options,
        )
        heard[form] = sum(written)
    return heard


def _wants_whole_files(directory: Path) -> Any:
    """A file system that takes bytes only in order, as far as the probe can tell."""
    model = fsdp2()(expected(directory))
    target, config = place(directory, "ordered", "hf"), directory / "hf-untied"
    with patch("dcpconv.conversion.saving.staged.writes_anywhere", return_value=False):
        return save_weights(model, target, to="hf", assets=config).notes


def _with_fingerprint(directory: Path) -> Any:
    """Fingerprints by who writes what, and the bytes that were read for each."""
    model = fsdp2()(expected(directory))
    found = {}
    for name, whole, most in (("boxes", False, None), ("one", True, None), ("some", True, 50_000)):
        report = save_weights(
            model,
            place(directory, f"fingerprint-{name}", "hf"),
            to="hf",
            assets=directory / "hf-untied",
            whole_files=whole,
            max_file_size=most,
            fingerprint=True,
        )
        found[name] = report.fingerprint, report.fingerprint_nbytes, report.target.nbytes
    return found


SCENES: dict[int, dict[str, Scene]] = {
    ranks: {f"saves/{name}": _saves(name, wrap) for name, (wrap, _) in wraps.items()}
    for ranks, wraps in WRAPS.items()
}
SCENES[2] |= {
    "saves/fsdp2-tied": _saves("fsdp2-tied", fsdp2(), tied=True),
    "live": _live,
    "by-dcp": _by_dcp,
    "async": _async,
    "overwrites": _overwrites,
    "without-config": _without_config,
    "misfit": _misfit,
    "overflows": _overflows,
    "unequal-ties": _unequal_ties,
    "apart": _apart,
    "fails": _fails,
    "objects": _objects,
    "cached": _cached,
    "whole-files": _whole_files,
    "wants-whole-files": _wants_whole_files,
    "fingerprint": _with_fingerprint,
}
SCENES[4] |= {"whole-files": _whole_files, "halves": _half_of_the_ranks, "bytes": _bytes_written}

if __name__ == "__main__":
    take_part(SCENES)
