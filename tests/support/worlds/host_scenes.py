"""Scenes for ``dist_worlds``: ranks on several hosts, which are emulated by their names.

Run as a script by ``launch``; ``prepare`` writes what the scenes read.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from dcpconv.loading import catalogs, moving, world
from dcpconv.loading.groups import subgroup
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.replicas import TILE
from support.worlds import load_scenes
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.load_faults import Read
from support.worlds.sharded_models import (
    DEVICE,
    Wrap,
    build,
    ddp,
    expected,
    fsdp2,
    fsdp2_over_tp,
    hsdp,
    lingua_weights,
    local_tensors,
    tp,
)

RANKS = 4
SMALL = 16 << 10
"""Bytes of a tile that cuts the little model into many, some of them parts of a row."""


def prepare(directory: Path) -> None:
    """The checkpoints of ``load_scenes``, and a copy for every host."""
    load_scenes.prepare(directory, ())
    for host in range(RANKS):
        shutil.copytree(directory / "hf-untied", directory / f"copy-{host}")
    shutil.copytree(directory / "bf16", directory / "other-2")
    for host in (0, 1, 3):
        shutil.copytree(directory / "hf-untied", directory / f"other-{host}")
    _prepare_adapters(directory)


def _prepare_adapters(directory: Path) -> None:
    """An adapter, a copy for every host, one that is scaled otherwise there, and what one process
    makes of it."""
    from dcpconv import convert
    from support.checkpoints.adapters import factors, peft_tensors, save_peft
    from support.checkpoints.families import hf_tensors

    base = directory / "hf-untied"
    tensors = peft_tensors(factors(hf_tensors(base), ("q_proj", "down_proj")))
    save_peft(directory / "adapter", tensors)
    for host in range(RANKS):
        shutil.copytree(directory / "adapter", directory / f"adapter-copy-{host}")
        save_peft(directory / f"adapter-other-{host}", tensors, lora_alpha=host + 1)
    convert(base, directory / "adapted-hf", form="hf", adapter=directory / "adapter")
    torch.save(hf_tensors(directory / "adapted-hf"), directory / "adapted.pt")


def host_of(rank: int, hosts: int) -> int:
    """The number of the host of a rank: neighbours are on one host."""
    return rank * hosts // RANKS


@contextmanager
def on_hosts(hosts: int) -> Iterator[None]:
    """Every rank says that it runs on one of some hosts."""
    name = f"host-{host_of(dist.get_rank(), hosts)}"
    with patch.object(catalogs, "hostname", lambda: name):
        yield


def _equal(found: nn.Module, right: nn.Module) -> None:
    ours, theirs = local_tensors(found), local_tensors(right)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def _loads(wrap: Wrap, read: Read, hosts: int, *, tile: int | None = None) -> Scene:
    """The right shards, and who read what."""

    def scene(directory: Path) -> Any:
        model = wrap(build(meta=wrap is not ddp))
        with on_hosts(hosts), patch.object(moving, "TILE", tile or TILE):
            report = load_init_weights(model, directory / "hf-untied", read=read)
        _equal(model, wrap(expected(directory)))
        return {
            "bytes": report.nbytes,
            "read": report.nbytes_read,
            "received": report.nbytes_received,
            "how": report.read,
            "notes": report.notes,
        }

    return scene


def _casts(wrap: Wrap) -> Scene:
    """Tiles of fp32 into bf16, strided shards included."""

    def scene(directory: Path) -> Any:
        model = wrap(build(meta=True, dtype=torch.bfloat16))
        with patch.object(moving, "TILE", SMALL):
            load_init_weights(model, directory / "hf-untied", read="once")
        right = expected(directory).to(torch.bfloat16)
        found = {k: t for k, t in local_tensors(model).items() if "rope" not in k}
        wanted = {k: t for k, t in local_tensors(wrap(right)).items() if "rope" not in k}
        for key, tensor in wanted.items():
            assert torch.equal(found[key], tensor), key
        return None

    return scene


_OPENED: list[str] | None = None


def _note_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _OPENED is not None and isinstance(arguments[0], str | os.PathLike):
        _OPENED.append(os.fspath(arguments[0]))


@contextmanager
def _opens() -> Iterator[list[str]]:
    """Every file that this process opens in the block."""
    global _OPENED  # noqa: PLW0603 - an audit hook stays for good
    if _OPENED is None:
        sys.addaudithook(_note_opens)
    found: list[str] = []
    _OPENED = found
    try:
        yield found
    finally:
        _OPENED = []


@contextmanager
def _opened_before_moving(hosts: int, below: Path) -> Iterator[list[str]]:
    """Which files below a path are opened on one of some hosts before anything moves."""
    found: list[str] = []
    original = moving._materialise

    def stop_counting(*arguments: Any) -> None:
        found.extend(Path(path).name for path in opened if str(below) in path)
        original(*arguments)

    with (
        on_hosts(hosts),
        patch.object(moving, "_materialise", stop_counting),
        _opens() as opened,
    ):
        yield found


def _planning(name: str, hosts: int, *, own: bool = False) -> Scene:
    """Which files of the checkpoint are opened before anything moves."""

    def scene(directory: Path) -> Any:
        host = host_of(dist.get_rank(), hosts)
        source = directory / (f"{name}-{host}" if own else name)
        model = fsdp2()(build(meta=True))
        with _opened_before_moving(hosts, source) as found:
            load_init_weights(model, source)
        _equal(model, fsdp2()(expected(directory)))
        return found

    return scene


def _adapting(name: str, hosts: int, *, own: bool = False, read: Read = "auto") -> Scene:
    """Which files of an adapter are opened before anything moves."""

    def scene(directory: Path) -> Any:
        host = host_of(dist.get_rank(), hosts)
        adapter = directory / (f"{name}-{host}" if own else name)
        model = fsdp2()(build(meta=True))
        with _opened_before_moving(hosts, adapter) as found:
            load_init_weights(model, directory / "hf-untied", adapter=adapter, read=read)
        right = expected(directory)
        weights = lingua_weights(torch.load(directory / "adapted.pt"))
        with torch.no_grad():
            for fqn, parameter in right.named_parameters():
                parameter.copy_(weights[fqn])
        _equal(model, fsdp2()(right))
        return found

    return scene


def _adapting_in_part_of_the_job(directory: Path) -> Any:
    """Ranks 1 and 3 merge an adapter by themselves."""
    group = dist.new_group([1, 3])
    if dist.get_rank() not in {1, 3}:
        return None
    model = build(meta=True)
    names = {"adapter": directory / "adapter", "process_group": group}
    report = load_init_weights(model, directory / "hf-untied", **names)
    weights = lingua_weights(torch.load(directory / "adapted.pt"))
    for fqn, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[fqn]), fqn
    return len(report.loaded)


def _some_have_more(directory: Path) -> Any:
    """One rank merges an adapter more than the others."""
    names = [directory / "adapter"] * (1 + (dist.get_rank() == 1))
    load_init_weights(fsdp2()(build(meta=True)), directory / "hf-untied", adapter=names)


def _differs(directory: Path) -> Any:
    """Another checkpoint on one of the hosts."""
    host = host_of(dist.get_rank(), RANKS)
    with on_hosts(RANKS):
        load_init_weights(fsdp2()(build(meta=True)), directory / f"other-{host}")


def _unreachable(directory: Path) -> Any:
    """The hub cannot be reached from one host."""
    del directory

    def path_of(name: Any) -> Path:
        raise OSError(f"no route to {name}")

    with on_hosts(2), patch.object(catalogs, "path_of", path_of):
        load_init_weights(fsdp2()(build(meta=True)), "org/model")


def _over_cpu(read: Read) -> Scene:
    """A group that sends nothing from the CPU, as NCCL's: what is planned takes one of its own."""

    def scene(directory: Path) -> Any:
        asked: list[Any] = []

        def make(group: Any, ranks: Any, **options: Any) -> Any:
            asked.append(tuple(ranks))
            return subgroup(group, ranks, **options)

        model = ddp(build(meta=False))
        with (
            patch.object(world, "sends_from", lambda _group, _kind: False),
            patch.object(world, "subgroup", make),
        ):
            load_init_weights(model, directory / "hf-untied", read=read)
            first = {id(subgroup(dist.group.WORLD, ranks)) for ranks in asked}
            load_init_weights(model, directory / "hf-untied", read=read)
        _equal(model, ddp(expected(directory)))
        assert {id(subgroup(dist.group.WORLD, ranks)) for ranks in asked} == first
        return [len(first), sorted(set(asked))]

    return scene


def _in_part_of_the_job(directory: Path) -> Any:
    """Ranks 1 and 3 load by themselves, over groups that the others never hear of."""
    group = dist.new_group([1, 3])
    if dist.get_rank() not in {1, 3}:
        return None
    model = build(meta=True)
    with patch.object(moving, "TILE", SMALL):
        report = load_init_weights(
            model, directory / "hf-untied", process_group=group, read="once", device=DEVICE
        )
    _equal(model, expected(directory))
    return report.nbytes_read


SHARED: dict[str, Callable[[], Wrap]] = {
    "ddp": lambda: ddp,
    "hsdp": lambda: hsdp,
    "tp": tp,
    "fsdp2-tp": lambda: fsdp2_over_tp(uneven=False),
}
SCENES: dict[int, dict[str, Scene]] = {
    RANKS: {
        **{
            f"tiles/{name}/{read}": _loads(wrap(), read, 2, tile=SMALL)
            for name, wrap in SHARED.items()
            for read in ("once", "host", "rank0")
        },
        **{f"casts/{name}": _casts(SHARED[name]()) for name in ("hsdp", "fsdp2-tp")},
        **{f"auto/fsdp2/{hosts}": _loads(fsdp2(), "auto", hosts) for hosts in (1, 2, 4)},
        **{f"auto/ddp/{hosts}": _loads(ddp, "auto", hosts) for hosts in (1, 2, 4)},
        "once/fsdp2": _loads(fsdp2(), "once", 4),
        "opens/shared": _planning("hf-untied", 2),
        "opens/copies": _planning("copy", 2, own=True),
        "adapter/shared": _adapting("adapter", 2),
        "adapter/copies": _adapting("adapter-copy", 2, own=True),
        "adapter/rank0": _adapting("adapter", 2, read="rank0"),
        "adapter/differs": _adapting("adapter-other", 4, own=True),
        "adapter/part-of-the-job": _adapting_in_part_of_the_job,
        "adapter/more": _some_have_more,
        "differs": _differs,
        "hub/unreachable": _unreachable,
        "over-cpu/all": _over_cpu("all"),
        "over-cpu/once": _over_cpu("once"),
        "part-of-the-job": _in_part_of_the_job,
    }
}

if __name__ == "__main__":
    take_part(SCENES)
