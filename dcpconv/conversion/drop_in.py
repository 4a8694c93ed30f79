"""``torch_save_to_dcp`` and ``dcp_to_torch_save`` with torch's signatures and our engine.

    from dcpconv import dcp_to_torch_save, torch_save_to_dcp

They take what torch's take and write what torch's write: the same keys, the same nesting, the same
objects.  What differs is for the better: memory is a constant, tied tensors stay one, the result
appears whole or not at all, and nothing in the source is unpickled without restrictions.

Source:
    torch 2.13 ``torch/distributed/checkpoint/format_utils.py``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dcpconv.conversion.convert import convert
from dcpconv.core.catalog import Catalog
from dcpconv.core.outline import Outline
from dcpconv.engine.execute import execute
from dcpconv.engine.publish import staging
from dcpconv.engine.space import block_size, check_space
from dcpconv.formats import dcp, torchfile
from dcpconv.formats.dcp.names import METADATA_FILE
from dcpconv.plan.coverage import cover_as_stored
from dcpconv.plan.fills import make_plan, whole
from dcpconv.sources.recognition import Weights
from dcpconv.stores.schemes import refuse_scheme


def dcp_to_torch_save(
    dcp_checkpoint_dir: str | os.PathLike[str], torch_save_path: str | os.PathLike[str]
) -> None:
    """Converts a DCP directory into one ``torch.save`` file.

    Like torch's, it replaces an existing file; unlike torch's, only once the new one is complete,
    and it makes the directories above it.

    Args:
        dcp_checkpoint_dir: Directory with ``.metadata``.
        torch_save_path: The file to write.

    Raises:
        FormatError: A file is truncated, malformed or unsafe.
        NoSpaceError: The disk cannot hold the result.
    """
    convert(dcp_checkpoint_dir, torch_save_path, form="torch", overwrite=True)


def torch_save_to_dcp(
    torch_save_path: str | os.PathLike[str], dcp_checkpoint_dir: str | os.PathLike[str]
) -> None:
    """Converts one ``torch.save`` file into a DCP directory.

    Like torch's, it makes the directory and those above it, replaces a DCP that is there already,
    and leaves other files of the directory (``params.json``, a tokenizer) where they are; unlike
    torch's, it also removes the ``*.distcp`` files of a DCP it replaces.

    Args:
        torch_save_path: The file; not below ``dcp_checkpoint_dir``.
        dcp_checkpoint_dir: Directory to write.

    Raises:
        FormatError: The file is truncated, malformed or unsafe, or in the form before zip
            archives, which ``convert(..., engine="torch")`` reads.
        NoSpaceError: The disk cannot hold the result.
    """
    refuse_scheme(torch_save_path)
    source, target = Path(torch_save_path), Path(dcp_checkpoint_dir)
    catalog = torchfile.read_catalog(source)
    outline = _outline(catalog, modulus=block_size(target))
    with staging(target, overwrite=True, is_file=False, source=source) as stage:
        check_space(target, sum(file.nbytes for file in outline.files))
        execute(outline, source=catalog.path, target=stage.path, identities=catalog.identities)
        for path in _others(stage.target):
            _keep(path, stage.path / path.name)
        stage.publish(outline.commit)


def _outline(catalog: Catalog, *, modulus: int) -> Outline:
    everything = Weights(catalog, catalog.tensors, catalog.tied, None, "", ())
    tensors = make_plan(
        cover_as_stored(everything),
        path_of=catalog.path_of,
        regions=whole,
        dtype_of=lambda target: target.dtype,
    )
    objects = {catalog.path_of(key): value for key, value in catalog.objects.items()}
    return dcp.outline(tensors, objects, modulus=modulus)


def _others(directory: Path) -> Iterator[Path]:
    """What stands in a directory beside the files of a DCP."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name != METADATA_FILE and path.suffix != ".distcp":
                yield path


def _keep(path: Path, into: Path) -> None:
    """A second name for a file, or for every file of a directory; a copy where that cannot be."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, into, symlinks=True, copy_function=_link)
    else:
        _link(path, into)


def _link(path: str | Path, into: str | Path) -> None:
    try:
        os.link(path, into, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, into, follow_symlinks=False)
