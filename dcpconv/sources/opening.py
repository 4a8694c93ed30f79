"""Opens what a check may compare: a checkpoint, a hub id, a key list, a config, a live model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.families.configs import lingua, meta
from dcpconv.families.configs.parameters import read_fields
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources import hub_headers
from dcpconv.sources.key_lists import is_keylist, is_model, read_keylist, read_model
from dcpconv.sources.live_models import LiveModel, live_model
from dcpconv.sources.settling import find_spec
from dcpconv.stores import hub

Named = str | os.PathLike[str] | Any
"""A path or hub id; or a live model or state_dict, whose types only torch could name."""


@dataclass(frozen=True, slots=True)
class Side:
    """Keys and shapes, and what is known about the model they belong to.

    Attributes:
        catalog: The keys; chunks where bytes are behind them.
        spec: The model's numbers, if a config was found.
        end: What reports call it.
        family: Naming that the thing itself states, or ``""``.
        notes: What to say about how it was read.
        is_config: Whether there are no keys but those that follow from ``spec``.
        model: What a model of transformers says of its names.
    """

    catalog: Catalog
    spec: ModelSpec | None
    end: End
    family: str = ""
    notes: tuple[str, ...] = ()
    is_config: bool = False
    model: LiveModel | None = None


def open_side(what: Named, *, assets: str | None = None, problems: list[str] | None = None) -> Side:
    """Reads headers, or whatever else says which keys there are; no tensor.

    Args:
        what: A checkpoint of any form, a hub id, a key list, a live model or state_dict.
        assets: Directory with the config, where ``what`` has none beside it.
        problems: Collects what is wrong with the files instead of raising.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        FormatError: A file is malformed.
    """
    if is_model(what):
        catalog = read_model(what)
        name = type(what).__name__
        end = End(name, "module", len(catalog.tensors))
        return Side(catalog, _stated(assets), end, model=live_model(what))
    if not isinstance(what, (str, os.PathLike)):
        raise DcpconvError(
            "cannot take keys from this",
            [("found", type(what).__name__)],
            hint="give a path, a hub id, an nn.Module or a state_dict",
        )
    path = Path(what)
    if is_keylist(path):
        catalog, family = read_keylist(path)
        end = End(str(path), "keys", len(catalog.tensors))
        return Side(catalog, _stated(assets), end, family or "")
    name = os.fspath(what)
    if hub.is_hub_id(name):
        catalog, config = hub_headers.read_catalog(name, problems=problems)
        spec, notes = find_spec(catalog, assets or config)
        shown = name
    else:
        catalog = open_checkpoint(path, problems=problems)
        spec, notes = find_spec(catalog, assets)
        shown = str(path)
    end = End(shown, catalog.form, len(catalog.tensors), len(catalog.files))
    return Side(catalog, spec, end, notes=(*catalog.notes, *notes))


def open_target(what: Named) -> Side:
    """Reads the TARGET of a check, which may also be a parameter file without a checkpoint.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        FormatError: A file is malformed: against a damaged target nothing can be told.
    """
    if isinstance(what, (str, os.PathLike)):
        path = Path(what)
        if path.is_file() and path.suffix == ".json" and not is_keylist(path):
            return _config(path)
        try:
            return open_side(what)
        except NotACheckpointError:
            beside = configs.find_config(path) if path.is_dir() else None
            if beside is None:
                raise
            return _config(beside)
    return open_side(what)


def _config(file: Path) -> Side:
    spec = configs.read_spec(file)
    fields = read_fields(file)
    family = "hf"
    for module in (lingua, meta):
        if module.is_params(fields):
            family = module.__name__.rpartition(".")[2]
            break
    nothing = Catalog("hf", file.parent, file, {}, {})
    return Side(nothing, spec, End(str(file), "config"), family, is_config=True)


def _stated(assets: str | None) -> ModelSpec | None:
    return configs.read_spec(Path(assets)) if assets is not None else None


@dataclass(frozen=True, slots=True)
class End:
    """One side of a check, as the user named it.

    Attributes:
        path: Path, hub id, or the class of a live model; empty for a family by name.
        form: How bytes are stored, ``keys`` for a list of keys, ``module`` for a live model,
            ``config`` for a parameter file, or empty for a family by name.
        keys: Tensors in it.
        files: Files with tensor data.
    """

    path: str = ""
    form: str = ""
    keys: int = 0
    files: int = 0
