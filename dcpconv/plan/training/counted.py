"""Runs whose optimizer counts its parameters: MiniMind's resume file and Trainer's directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dcpconv.core.errors import NotACheckpointError
from dcpconv.families.keymaps import keymaps
from dcpconv.formats import safetensors, torchfile
from dcpconv.plan.training import deepspeed
from dcpconv.plan.training.adapters import adapter_orders, architecture_of
from dcpconv.plan.training.files import (
    below,
    joined,
    nested,
    parts_of_optimizer,
    prefixed,
)
from dcpconv.plan.training.named import read_deepspeed, read_named
from dcpconv.plan.training.order import by_fqn, minimind_orders, trainer_orders
from dcpconv.plan.training.state import TrainingState
from dcpconv.plan.training.understood import understood, with_ties
from dcpconv.sources.adapters.reading import open_adapter
from dcpconv.sources.adapters.spotting import is_adapter
from dcpconv.sources.said import Said
from dcpconv.stores.json_files import read_json

_RNG: Final = re.compile(r"rng_state(_[0-9]{1,9})?\.pth")
_LARGEST_ARGUMENTS: Final = 1 << 20
"""Bytes of ``training_args.bin``; it is carried whole, because only its own classes read it."""


def read_minimind(path: Path, said: Said) -> TrainingState:
    """MiniMind's ``*_resume.pth``.

    Raises:
        NotACheckpointError: The file holds no training state.
        OptimizerError: It is not certain which parameter a number means.
    """
    catalog = torchfile.read_catalog(path)
    value = nested(path, catalog)
    optimizer = value.get("optimizer")
    if not isinstance(value.get("model"), Mapping) or not isinstance(optimizer, Mapping):
        raise NotACheckpointError(
            "file holds no training state",
            [("file", path), ("expected", "model and optimizer"), ("found", ", ".join(value))],
            hint="weights alone are for `dcpconv convert`",
        )
    own = [table for name, table in keymaps().items() if name.startswith("minimind")]
    found = understood(catalog, said, root="model", tables=own)
    if found.weights.keymap is None:  # another trainer's file with the same containers
        found = understood(catalog, said, root="model")
    weights, notes = found.weights, found.notes
    parts = parts_of_optimizer(optimizer, path)
    moments, groups = by_fqn(*parts, minimind_orders(weights), weights)
    beside = {key: item for key, item in value.items() if key not in {"model", "optimizer"}}
    if any(entry.dtype.name == "float16" for entry in weights.entries.values()):
        notes += ("MiniMind stores the weights in fp16: what fp32 weights had beyond it is lost",)
    return TrainingState(
        kind="minimind",
        source=path,
        root=catalog.path,
        model=with_ties(found, groups),
        moments=moments,
        groups=groups,
        beside=beside,
        notes=notes,
        identities=catalog.identities,
    )


def read_trainer(path: Path, said: Said) -> TrainingState:
    """A ``checkpoint-N`` of Hugging Face Trainer: of one process, FSDP or DeepSpeed.

    Raises:
        NotACheckpointError: The directory holds no optimizer state.
        OptimizerError: It is not certain which parameter a number means.
    """
    beside: dict[str, object] = {"trainer_state": read_json(path / "trainer_state.json")}
    for file in sorted(path.iterdir()):
        name = file.stem
        if file.name in {"scheduler.pt", "scaler.pt"} or _RNG.fullmatch(file.name):
            beside[name] = nested(file, prefixed(torchfile.read_catalog(file), name))
        elif file.name == "training_args.bin" and file.stat().st_size <= _LARGEST_ARGUMENTS:
            beside[name] = file.read_bytes()
    if (path / "pytorch_model_fsdp_0").is_dir() and (path / "optimizer_0").is_dir():
        parts = [below(path, name) for name in ("pytorch_model_fsdp_0", "optimizer_0")]
        found = read_named("hf-trainer", path, joined(path, parts), said)
        return replace(found, beside={**found.beside, **beside})
    if not any((path / name).is_file() for name in ("optimizer.pt", "optimizer.bin")) and (
        directory := deepspeed.find(path)
    ):
        return replace(read_deepspeed(directory, path, said), kind="hf-trainer", beside=beside)
    optimizers = [p for n in ("optimizer.pt", "optimizer.bin") if (p := path / n).is_file()]
    if not optimizers:
        raise NotACheckpointError(
            "directory holds no optimizer state",
            [("directory", path), ("expected", "optimizer.pt, optimizer.bin or optimizer_0")],
            hint="weights alone are for `dcpconv convert`",
        )
    return _read_one_process(path, optimizers[0], beside, said)


def _read_one_process(
    path: Path, file: Path, beside: Mapping[str, object], said: Said
) -> TrainingState:
    value = nested(file, prefixed(torchfile.read_catalog(file), "optimizer"))
    if is_adapter(path):
        found = replace(understood(open_adapter(path), Said(), root="", tables=()), said=said)
        orders = adapter_orders(found.weights, architecture_of(said))
    else:
        is_hf = safetensors.is_hf(path)
        catalog = safetensors.read_catalog(path) if is_hf else torchfile.read_catalog(path)
        found = understood(catalog, said, root="")
        orders = trainer_orders(found.weights)
    moments, groups = by_fqn(*parts_of_optimizer(value, file), orders, found.weights)
    return TrainingState(
        kind="hf-trainer",
        source=path,
        root=path,
        model=with_ties(found, groups),
        moments=moments,
        groups=groups,
        beside=beside,
        notes=found.notes,
    )
