"""Opens whatever has keys: a checkpoint, here or in a store, a key list, a config, a live model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpconv.core.catalog import Catalog, Shapes
from dcpconv.core.errors import DcpconvError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.said import Said
from dcpconv.stores.schemes import path_of

if TYPE_CHECKING:
    from dcpconv.formats.ranks.flat import FindParameters, Parameters
    from dcpconv.sources.live_models import LiveModel

Openable = str | os.PathLike[str] | Any
"""A path, URL or hub id; or a live model or state_dict, whose types only torch could name."""


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


@dataclass(frozen=True, slots=True)
class Opened:
    """Keys and shapes, and where to look for the model's numbers.

    Attributes:
        catalog: The keys; chunks where bytes are behind them.
        end: What reports call it.
        family: Naming that the thing itself states, or ``""``.
        place: Where its parameter file would be, if it has one.
        model: What a model of transformers says of its names.
    """

    catalog: Catalog
    end: End
    family: str = ""
    place: Path | None = None
    model: LiveModel | None = None


def open_source(
    what: Openable,
    *,
    problems: list[str] | None = None,
    said: Said | None = None,
    shapes: Shapes | None = None,
) -> Opened:
    """Reads headers, or whatever else says which keys there are; no tensor.

    Args:
        what: A checkpoint of any form, a hub id, a key list, a live model or state_dict.
        problems: Collects what is wrong with the files instead of raising.
        said: What the user says of it: a file may lack what only that tells.
        shapes: Of the parameters of a live model, in their order, for the same reason.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        FormatError: A file is malformed.
    """
    from dcpconv.sources.key_lists import (  # noqa: PLC0415 - conversions read none
        is_keylist,
        is_model,
        read_keylist,
        read_model,
    )

    if is_model(what):
        from dcpconv.sources.live_models import live_model  # noqa: PLC0415 - files have no model

        catalog = read_model(what)
        end = End(type(what).__name__, "module", len(catalog.tensors))
        return Opened(catalog, end, model=live_model(what))
    if not isinstance(what, (str, os.PathLike)):
        raise DcpconvError(
            "cannot take keys from this",
            [("found", type(what).__name__)],
            hint="give a path, a hub id, an nn.Module or a state_dict",
        )
    path = path_of(what)
    if is_keylist(path):
        catalog, family = read_keylist(path)
        return Opened(catalog, End(str(path), "keys", len(catalog.tensors)), family or "")
    find = parameters_of(path, said or Said(), shapes)
    catalog = open_checkpoint(path, problems=problems, parameters=find)
    return Opened(catalog, _end(str(path), catalog), place=catalog.source)


def parameters_of(path: Path, said: Said, live: Shapes | None = None) -> FindParameters:
    """Looks for names and shapes that the files in ``path`` lack, once they turn out to."""

    def find() -> Parameters | None:
        from dcpconv.sources.parameter_shapes import (  # noqa: PLC0415 - few files lack them
            find_parameters,
        )

        return find_parameters(path, said, live=live)

    return find


def only_config(file: Path) -> Opened:
    """A parameter file in place of a checkpoint: no keys but those that follow from its numbers."""
    return Opened(Catalog("hf", file.parent, file, {}, {}), End(str(file), "config"), place=file)


def _end(name: str, catalog: Catalog) -> End:
    return End(name, catalog.form, len(catalog.tensors), len(catalog.files))
