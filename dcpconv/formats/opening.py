"""Opens a checkpoint of any form, or says what the path is instead."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.formats import safetensors
from dcpconv.formats.dcp.names import METADATA_FILE
from dcpconv.stores.schemes import path_of

if TYPE_CHECKING:
    from dcpconv.formats.ranks.flat import FindParameters

# Each form is imported when a path turns out to be of it: importing all of them takes longer than
# reading the headers of one.


def open_checkpoint(
    path: str | Path,
    *,
    problems: list[str] | None = None,
    parameters: FindParameters | None = None,
) -> Catalog:
    """Reads what a checkpoint holds, without reading its tensors.

    Args:
        path: A directory of safetensors, a ``torch.save`` file or a directory of them, a DCP
            directory, or the directory of a run that left one file per rank.
        problems: Collects what is wrong with the files instead of raising, so that a check can
            list everything at once.
        parameters: Looks for names and shapes of parameters, where files lack them: FSDP1's local
            state dicts do.

    Raises:
        NotACheckpointError: The path is absent, or holds no checkpoint; says what it looks like.
        FormatError: A file is truncated, malformed or unsafe.
        SchemeError: It is a URL of a store that is not served.
        StoreError: A store does not answer as it should.
    """
    path = path_of(path)
    if not path.exists():
        raise NotACheckpointError("there is no such file or directory", [("path", path)])
    try:
        return _open(path, problems, parameters)
    except FormatError as error:
        if error.kind != "untrusted":
            raise
        hint = _trusting(path)
        raise FormatError(error.headline, error.facts, hint=hint, kind=error.kind) from error


def _trusting(path: Path) -> str:
    """What to do where a pickle names code: torch reads one file, or a DCP, if it is trusted."""
    from dcpconv.formats import torchfile  # noqa: PLC0415

    file = path
    if path.is_dir() and not (path / METADATA_FILE).is_file():
        alone = torchfile.alone_in(path)
        if alone is None:
            return "load it with the program that wrote it, and save a state_dict of tensors"
        file = alone
    command = shlex.join(["dcpconv", "convert", str(file), "DST", "--engine", "torch", "--trust"])
    return f"if you trust whoever wrote this file: {command}"


def _open(path: Path, problems: list[str] | None, parameters: FindParameters | None) -> Catalog:
    if (path / METADATA_FILE).is_file():
        from dcpconv.formats import dcp  # noqa: PLC0415

        return dcp.read_catalog(path, problems=problems)
    if (path / "metadata.pkl").is_file():
        from dcpconv.formats.ranks import torch_checkpointing  # noqa: PLC0415

        return torch_checkpointing.read_catalog(path)
    if safetensors.is_hf(path):
        return _with_masters_noted(safetensors.read_catalog(path, problems=problems), path)
    if path.suffix == ".distcp":  # the items in it are torch.save archives, each on its own
        from dcpconv.formats.strangers import explain  # noqa: PLC0415

        raise explain(path)
    from dcpconv.formats import ranks, torchfile  # noqa: PLC0415

    if (found := ranks.read_catalog(path, problems, parameters)) is not None:
        return found
    if path.is_dir() and (path / "consolidated.00.pth").is_file():
        from dcpconv.formats.torchfile import meta_ranks as metashards  # noqa: PLC0415

        if metashards.is_split(path):
            return metashards.read_catalog(path)
    if torchfile.is_torch_file(path) or torchfile.is_one_in_a_directory(path):
        return torchfile.read_catalog(path, problems=problems)
    from dcpconv.formats.strangers import explain  # noqa: PLC0415

    raise explain(path)


def _with_masters_noted(catalog: Catalog, path: Path) -> Catalog:
    """A ``checkpoint-N`` of a DeepSpeed run is the 16-bit model in it; the masters lie deeper."""
    if not (path / "latest").is_file():
        return catalog
    from dcpconv.formats import ranks  # noqa: PLC0415

    if not ranks.is_run(path):
        return catalog
    note = f"fp32 weights of DeepSpeed are beside these: name the directory in {path} that has them"
    return replace(catalog, notes=(*catalog.notes, note))
