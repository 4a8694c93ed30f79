"""Scenes for ``dist_worlds``: several ranks load from a bucket or a static server.

Run as a script by ``launch``; ``prepare`` writes what is served.  Every rank reaches the bucket
through a server of its own, so that it can be told who asked for what.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dcpconv.loading import catalogs, moving
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.stores import fetching
from support.versions import save_alone
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.load_faults import Read
from support.worlds.sharded_models import Wrap, ddp, local_tensors

SERVERS = "servers.json"
"""Says ``{"s3": [URL of each rank's server], "http": URL}``."""
WIDTH, LAYERS = 1024, 3
"""Shards of a rank lie further apart than what is fetched along with them."""
NBYTES = LAYERS * WIDTH * WIDTH * 4
TILE = 1 << 20
"""Bytes of a tile, so that every rank reads some."""


def build() -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    return model


def prepare(directory: Path) -> None:
    """The model in two shard files, and as a DCP."""
    torch.manual_seed(18)
    weights = {f"{layer}.weight": torch.randn(WIDTH, WIDTH) for layer in range(LAYERS)}
    hf = directory / "hf"
    hf.mkdir(parents=True)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files = {key: names[min(layer, 1)] for layer, key in enumerate(weights)}
    for name in names:
        save_file({key: weights[key] for key in weights if files[key] == name}, hf / name)
    index = {"metadata": {"total_size": NBYTES}, "weight_map": files}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    save_alone(weights, checkpoint_id=directory / "dcp")


def _fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPS: dict[str, Wrap] = {"ddp": ddp, "fsdp2": _fsdp2}


@contextmanager
def _reaching(directory: Path, hosts: int = 1) -> Iterator[str]:
    """The URL of the static server; the environment points to this rank's way to the bucket."""
    servers = json.loads((directory / SERVERS).read_text())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ["AWS_ENDPOINT_URL"] = servers["s3"][rank]
    name = f"host-{rank * hosts // ranks}"
    with (
        patch.object(catalogs, "hostname", lambda: name),
        patch.object(fetching, "_FIRST_PAUSE", 0.0),
    ):
        yield str(servers["http"])


def _loads(name: str, wrap: str, read: Read, hosts: int = 1) -> Scene:
    """The bits that loading from the disk gives, and who read what."""

    def scene(directory: Path) -> Any:
        model, right = WRAPS[wrap](build()), WRAPS[wrap](build())
        form = name.split("/")[1]
        with _reaching(directory, hosts) as http, patch.object(moving, "TILE", TILE):
            place = name if not name.startswith("http") else name.removeprefix("http/")
            url = f"{http}/{place}" if name.startswith("http") else f"s3://tests/{place}"
            report = load_init_weights(model, url, read=read)
        load_init_weights(right, directory / form, read="all")
        found = local_tensors(model)
        for key, tensor in local_tensors(right).items():
            assert torch.equal(found[key], tensor), key
        return {"how": report.read, "read": report.nbytes_read, "notes": report.notes}

    return scene


def _fails(name: str, read: Read) -> Scene:
    """One of the servers does not answer."""

    def scene(directory: Path) -> Any:
        with _reaching(directory):
            load_init_weights(WRAPS["ddp"](build()), f"s3://tests/{name}", read=read)

    return scene


def _changes(name: str) -> Scene:
    """Somebody replaces a file between what rank 0 listed and the first range of its bytes."""

    def scene(directory: Path) -> Any:
        original = moving._materialise

        def replaced(*arguments: Any) -> None:
            if dist.get_rank() == 0:
                import boto3

                client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
                key = f"{name}/model-00002-of-00002.safetensors"
                data = client.get_object(Bucket="tests", Key=key)["Body"].read()
                client.put_object(Bucket="tests", Key=key, Body=data[:-1] + b"!")
            dist.barrier()
            original(*arguments)

        with _reaching(directory), patch.object(moving, "_materialise", replaced):
            load_init_weights(WRAPS["fsdp2"](build()), f"s3://tests/{name}")

    return scene


SHARED: dict[str, tuple[str, Read, int, str]] = {
    # how it is wrapped, read=, hosts, what becomes of "auto"
    "ddp-once": ("ddp", "once", 1, "once"),
    "ddp-auto": ("ddp", "auto", 1, "host"),
    "ddp-hosts": ("ddp", "auto", 2, "host"),
    "fsdp2-once": ("fsdp2", "once", 1, "once"),
    "fsdp2-auto": ("fsdp2", "auto", 1, "host"),
}
PLACES = ("s3/hf", "s3/dcp", "http/hf")


def place_of(store: str, way: str) -> str:
    """What is served under a name of its own, so that it can be told which scene read it."""
    return f"{store}/{way}"


def _scenes(ranks: int) -> dict[str, Scene]:
    ways = {**SHARED, "ddp-apart": ("ddp", "auto", 3, "once")} if ranks == 3 else SHARED
    return {
        **{
            place_of(store, way): _loads(place_of(store, way), wrap, read, hosts)
            for store in PLACES
            for way, (wrap, read, hosts, _) in ways.items()
        },
        "broken/all": _fails("broken/all", "all"),
        "broken/once": _fails("broken/once", "once"),
        "closed": _fails("closed", "auto"),
        "changes": _changes("changes"),
    }


SCENES = {ranks: _scenes(ranks) for ranks in (2, 3)}

if __name__ == "__main__":
    take_part(SCENES)
