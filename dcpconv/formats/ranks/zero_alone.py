"""One file of a DeepSpeed checkpoint by itself: most are a share of something, one is a model."""

from __future__ import annotations

from pathlib import Path

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError
from dcpconv.formats.ranks.zero import weights_of
from dcpconv.formats.ranks.zero_files import (
    MODEL_FILE,
    OPTIM_FILE,
    read_mapping,
    read_model_file,
    read_pickle,
)
from dcpconv.formats.ranks.zero_world import ZeroWorld

_WHOLE_STAGE = 2
"""Up to this stage the model file has every parameter whole."""


def is_rank_file(path: Path) -> bool:
    """Whether DeepSpeed wrote a ``torch.save`` file: its pickle says so, whatever its name."""
    try:
        pickle, _ = read_pickle(path)
    except FormatError:
        return False
    return b"ds_version" in pickle or b"ds_config" in pickle or b"fp32_flat_groups" in pickle


def read_catalog(path: Path) -> Catalog | None:
    """The model in a file that ``is_rank_file``; ``None`` where it is no file of a checkpoint.

    Raises:
        FormatError: It holds one rank's share, which means nothing without the others.
    """
    value, _ = read_mapping(path)
    if "optimizer_state_dict" in value and "module" not in value:
        raise _refusal(path, "an optimizer's share of the weights, without their names")
    if not isinstance(value.get("module"), dict) or "param_shapes" not in value:
        return None
    model = read_model_file(path, path.name)
    if model.model_ranks > 1:
        raise _refusal(path, f"one of {model.model_ranks} parts of a split model")
    trained = {key for group in model.groups for key in group} | set(model.frozen)
    empty = [key for key in trained if (t := model.module.get(key)) is not None and not t.nbytes]
    if (model.stage or 0) > _WHOLE_STAGE or empty:
        raise _refusal(path, "a model file of ZeRO-3, whose parameters are empty")
    tensors, tied = weights_of(ZeroWorld(path.parent, (model,), ()))
    note = "these are the weights of the forward pass; the fp32 ones are in the *_optim_states.pt"
    return Catalog(
        form="torch",
        path=path.parent,
        source=path,
        files={path.name: model.nbytes},
        tensors=tensors,
        tied=tied,
        notes=(f"{note}: name the directory to read them",) if model.stage else (),
        identities={path.name: model.identity},
    )


def refuse(path: Path) -> None:
    """Raises for a file that is one rank's share of a checkpoint.

    Raises:
        FormatError: It is.
    """
    if path.is_file() and is_rank_file(path):
        read_catalog(path)


def _refusal(path: Path, what: str) -> FormatError:
    beside = sum(
        bool(MODEL_FILE.fullmatch(item.name) or OPTIM_FILE.fullmatch(item.name))
        for item in path.parent.iterdir()
    )
    named = f"name the directory instead: {path.parent}"
    return FormatError(
        "this is one rank's file of a DeepSpeed checkpoint, not a model",
        [("file", path), ("found", what)],
        hint=named
        if beside > 1
        else "name the global_step directory that this file was copied from",
    )
