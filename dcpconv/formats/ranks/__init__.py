"""One file per rank, as interrupted runs leave them: read as boxes of bytes in several files."""

from __future__ import annotations

from pathlib import Path

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError
from dcpconv.formats import torchfile
from dcpconv.formats.ranks import (
    fsdp,
    torch_checkpointing,
    universal,
    zero,
    zero_alone,
    zero_world,
)
from dcpconv.formats.ranks.flat import FindParameters
from dcpconv.formats.torchfile.files import INDEX_FILE, SINGLE_FILE

__all__ = ["is_run", "read_catalog", "refuse_share"]


def read_catalog(
    path: Path, problems: list[str] | None = None, parameters: FindParameters | None = None
) -> Catalog | None:
    """The model in the rank files of a directory, or in one of them; ``None`` where there are none.

    Args:
        path: The directory, or one file.
        problems: Collects what is wrong with the files of FSDP trainers instead of raising.
        parameters: Looks for names and shapes of parameters that lie flat in such files.

    Raises:
        FormatError: A file is missing, damaged or of another save, or is one rank's share alone.
    """
    if path.is_file():
        return zero_alone.read_catalog(path) if zero_alone.is_rank_file(path) else None
    if any((path / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)):
        return None
    if fsdp.is_rank_directory(path) and not torchfile.is_one_in_a_directory(path):
        return fsdp.read_catalog(path, problems, parameters)
    if torch_checkpointing.is_directory(path):
        return torch_checkpointing.read_catalog(path)
    if universal.is_universal(path):
        return universal.read_catalog(path, path)
    if (directory := zero_world.find(path)) is not None:
        return zero.read_catalog(directory, path)
    if (converted := universal.find(path)) is not None:
        return universal.read_catalog(converted, path)
    return None


def is_run(path: Path) -> bool:
    """Whether a directory holds rank files, or leads to some."""
    try:
        return path.is_dir() and (zero_world.find(path) or universal.find(path)) is not None
    except FormatError:
        return False


def refuse_share(path: Path) -> None:
    """Raises for a file that is one rank's share of a checkpoint, and means nothing alone.

    Raises:
        FormatError: It is.
    """
    zero_alone.refuse(path)
