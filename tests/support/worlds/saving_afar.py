"""Scenes for ``dist_worlds``: ranks save into a bucket, and into a repository on a hub.

Run as a script by ``launch``; the environment says where both are, and ``prepare`` of
``load_scenes`` writes the config that the scenes name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

from dcpconv import CheckpointWriter, save_weights
from dcpconv.conversion.saving import gathering
from dcpconv.conversion.saving.whole_files import InStore
from dcpconv.core.outline import OutFile
from dcpconv.engine import uploading
from dcpconv.stores.objects import ObjectsStore
from dcpconv.stores.store import StoreError
from support.machine.s3_server import BUCKET
from support.models.hf_models import tiny
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.saving_scenes import place
from support.worlds.sharded_models import DEVICE, expected, fsdp2

MIB = 1 << 20
FORMS: dict[str, dict[str, Any]] = {
    "hf": {"to": "hf"},
    "hf-small-files": {"to": "hf", "max_file_size": 60_000},
    "hf-bf16": {"to": "hf", "dtype": "bf16", "max_file_size": 60_000},
    "lingua-dcp": {"form": "dcp", "to": "lingua", "root": "model", "max_file_size": 60_000},
    "meta.pth": {"form": "torch", "to": "meta"},
}
SMALL: dict[str, Any] = FORMS["hf-small-files"]


def afar(name: str) -> str:
    """The URL of a result, for which all ranks are ready."""
    dist.barrier()
    return f"s3://{BUCKET}/{name}"


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


@contextmanager
def _sent() -> Iterator[list[str]]:
    """Names of the files that this rank makes objects of."""
    names: list[str] = []
    made = uploading.Uploads.open

    def noting(uploads: uploading.Uploads, file: OutFile) -> uploading.Upload:
        names.append(file.name)
        return made(uploads, file)

    with patch.object(uploading.Uploads, "open", noting):
        yield names


def _forms(directory: Path) -> Any:
    """Every form, in windows that cut tensors and elements, here and there."""
    model = fsdp2()(expected(directory))
    config = directory / "hf-untied"
    heard = {}
    with patch.object(gathering, "WINDOW", 10_001):
        for form, options in FORMS.items():
            target = place(directory, "afar", form)
            save_weights(model, target, assets=config, **options)
            with _sent() as names:
                report = save_weights(model, afar(f"forms/{form}"), assets=config, **options)
            heard[form] = {"sent": names, "notes": report.notes, "path": report.target.path}
    return heard


def _parts(directory: Path) -> Any:
    """An object of several parts, of which none waits for all that comes after it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1900, 1900), nn.Linear(1900, 1900)).to(DEVICE)
    fully_shard(model)
    target = place(directory, "afar", "parts")
    most = [0]
    buffer = uploading.Upload._buffer

    def noting(upload: uploading.Upload, number: int) -> bytearray:
        made = buffer(upload, number)
        most[0] = max(most[0], upload.uploads.waiting)
        return made

    with (
        patch.object(gathering, "WINDOW", 3 * MIB),
        patch.object(uploading, "PART", 5 * MIB),
        patch.object(uploading, "_ROOM", 10 * MIB),
        patch.object(uploading.Upload, "_buffer", noting),
    ):
        for where in (target, afar("parts")):
            save_weights(model, where, max_file_size=12 * MIB)
    return most[0]


def _saved(directory: Path, name: str, **options: Any) -> None:
    save_weights(
        fsdp2()(expected(directory)), afar(name), assets=directory / "hf-untied", **SMALL, **options
    )


def _overwrites(directory: Path) -> Any:
    model = fsdp2()(expected(directory))
    options = {"assets": directory / "hf-untied", **SMALL}
    save_weights(model, afar("overwritten"), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_weights(model, afar("overwritten"), overwrite=True, **options)
    save_weights(model, place(directory, "afar", "overwritten"), **options)
    save_weights(model, afar("overwritten"), **options)  # raises


def _instead(name: str, spoil: Callable[[], Any], **options: Any) -> Scene:
    """The last rank is spoilt while an older result is replaced."""

    def scene(directory: Path) -> Any:
        _saved(directory, name)
        if not is_last():
            return _saved(directory, name, overwrite=True, **options)
        with spoil():
            return _saved(directory, name, overwrite=True, **options)

    return scene


def _a_disk_fails() -> Any:
    """After a file of its own is there."""
    append, seen = InStore.append, list[str]()

    def failing(files: InStore, file: Any, start: int, data: memoryview) -> None:
        if file.name not in seen:
            seen.append(file.name)
        if len(seen) > 1:
            raise OSError(5, "Input/output error", "a disk")
        append(files, file, start, data)

    return patch.object(InStore, "append", failing)


def _the_store_says_no() -> Any:
    def refusing(*_: Any, **__: Any) -> None:
        raise StoreError("access was denied", [("object", "x")])

    return patch.object(ObjectsStore, "put", refusing)


def _it_goes_elsewhere() -> Any:
    def losing(store: ObjectsStore, key: str, parts: Any, **options: Any) -> None:
        del store, key, options
        list(parts)

    return patch.object(ObjectsStore, "put", losing)


def _nothing_is_installed() -> Any:
    return patch("dcpconv.stores.buckets.find_spec", return_value=None)


def _overflows(directory: Path) -> Any:
    """Known only when everything is there."""
    model = expected(directory)
    with torch.no_grad():
        model.get_parameter("layers.1.attention.wo.weight")[-1, -1] = 1e6
    config = directory / "hf-untied"
    save_weights(fsdp2()(model), afar("overflow"), assets=config, dtype="fp16", **SMALL)


def _unequal_ties(_: Path) -> Any:
    """Found by the ranks when they are about to write."""
    model = tiny("llama", tie_word_embeddings=True).to(DEVICE)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    fully_shard(model)
    save_weights(model, afar("ties"), max_file_size=60_000)


def _async(directory: Path) -> Any:
    """Two steps of one writer, the first one staged on the CPU."""
    model = fsdp2()(expected(directory))
    writer = CheckpointWriter(only="model", assets=directory / "hf-untied", **SMALL)
    state = {"model": get_model_state_dict(model), "step": 1}
    future = state_dict_saver.async_save(
        state, checkpoint_id=afar("steps/1"), storage_writer=writer
    )
    assert not hasattr(future, "upload_completion")
    future.result()
    state_dict_saver.save(state, checkpoint_id=afar("steps/2"), storage_writer=writer)
    assert writer.report is not None
    return writer.report.target.path


def _on_the_hub(directory: Path) -> Any:
    """One commit, by rank 0."""
    model = fsdp2()(expected(directory))
    options = {"assets": directory / "hf-untied", **SMALL}
    save_weights(model, place(directory, "afar", "hub"), **options)
    report = save_weights(model, "hf://org/tiny", **options)
    return report.notes


def _to(url: str) -> Scene:
    def scene(directory: Path) -> Any:
        model = fsdp2()(expected(directory))
        save_weights(model, url, to="hf", assets=directory / "hf-untied")

    return scene


SCENES: dict[int, dict[str, Scene]] = {
    2: {
        "forms": _forms,
        "parts": _parts,
        "overwrites": _overwrites,
        "fails": _instead("fails", _a_disk_fails),
        "denied": _instead("denied", _the_store_says_no),
        "elsewhere": _instead("elsewhere", _it_goes_elsewhere),
        "not-installed": _instead("not-installed", _nothing_is_installed),
        "overflows": _overflows,
        "unequal-ties": _unequal_ties,
        "async": _async,
        "hub": _on_the_hub,
        "file-url": _to("file:///tmp/x"),
        "read-only": _to("https://127.0.0.1:9/x"),
    }
}

if __name__ == "__main__":
    take_part(SCENES)
