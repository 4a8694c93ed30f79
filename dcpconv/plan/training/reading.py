"""Reads training checkpoints of every kind: headers, pickles without trust, and JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dcpconv.core.errors import NotACheckpointError
from dcpconv.formats import dcp
from dcpconv.formats.ranks import fsdp, fsdp_optimizer, torch_checkpointing
from dcpconv.plan.training import deepspeed
from dcpconv.plan.training.counted import read_minimind, read_trainer
from dcpconv.plan.training.named import read_deepspeed, read_named
from dcpconv.plan.training.state import Kind, TrainingState
from dcpconv.sources.said import Said
from dcpconv.stores.json_files import read_json
from dcpconv.stores.local import identities_of
from dcpconv.stores.schemes import refuse_scheme

_TRAIN_STATE: Final = re.compile(r"train_state_[0-9]{5,9}\.json")
_EXPECTED: Final = (
    "MiniMind's *_resume.pth, a directory with trainer_state.json, a DCP, or files of all ranks"
)


def read_training_state(
    source: str | os.PathLike[str],
    *,
    from_: str | None = None,
    assets: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, str] | None = None,
) -> TrainingState:
    """What a training checkpoint holds, with the optimizer's state by FQN.

    Args:
        source: A MiniMind ``*_resume.pth``, a Hugging Face ``checkpoint-N``, a DCP directory with
            weights and optimizer, a Lingua step directory, the rank files of FSDP, verl or
            DeepSpeed, or a directory of ``torch_checkpointing``.
        from_: Naming of its weights, where keys leave a choice.
        assets: Directory with the model's config, where the source has none.
        sizes: Numbers of the model (``n_heads``), where neither says.

    Raises:
        NotACheckpointError: There is no training checkpoint.
        OptimizerError: The optimizer's state cannot be told apart.
        FormatError: A file is damaged or unsafe.
    """
    refuse_scheme(source)
    path = Path(source)
    said = Said(from_=from_, assets=Path(assets) if assets else None, sizes=sizes or {})
    if path.is_file():
        return read_minimind(path, said)
    if (path / "trainer_state.json").is_file():
        # Of all files in it, before any is read: parts of two saves would be no step of a run.
        here = identities_of(path, [file.name for file in path.iterdir() if file.is_file()])
        found = read_trainer(path, said)
        return replace(found, identities={**found.identities, **here})
    if dcp.is_dcp(path):
        states = sorted(p for p in path.iterdir() if _TRAIN_STATE.fullmatch(p.name))
        kind: Kind = "lingua" if states else "dcp"
        found = read_named(kind, path, dcp.read_catalog(path), said)
        if not states:
            return found
        here = identities_of(path, [file.name for file in states])
        found = replace(found, identities={**found.identities, **here})
        return replace(found, beside={**found.beside, "train_states": [*map(read_json, states)]})
    if fsdp.is_rank_directory(path):
        found = read_named("fsdp", path, fsdp_optimizer.read_training(path), said)
        return replace(found, notes=(*found.notes, *_left_of_verl(path)))
    if torch_checkpointing.is_directory(path):
        return read_named("torch-checkpointing", path, torch_checkpointing.read_catalog(path), said)
    if (directory := deepspeed.find(path)) is not None:
        return read_deepspeed(directory, path, said)
    ranked = sorted(item for item in path.glob("*/") if fsdp.is_rank_directory(item))
    raise NotACheckpointError(
        "this is no training checkpoint that we know",
        [("path", path), ("expected", _EXPECTED)],
        hint=f"one file per rank lies in {', '.join(map(str, ranked[:3]))}; name that directory"
        if ranked
        else "weights without optimizer state are for `dcpconv convert`",
    )


def _left_of_verl(path: Path) -> tuple[str, ...]:
    """What is said of verl's schedulers and random states, of which every rank has its own."""
    files = sorted(item.name for item in path.glob("extra_state_world_size_*_rank_*.pt"))
    if not files:
        return ()
    return (f"{files[0]} and {len(files) - 1} more stay behind: verl's schedule and random states",)
