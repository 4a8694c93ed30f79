"""Meta's model-parallel releases: ``consolidated.00.pth``, ``consolidated.01.pth``, ... as one.

Every file holds its share of each matrix.  Which dim was cut follows from the layer: fairscale's
``ColumnParallelLinear`` cuts rows of the weight, ``RowParallelLinear`` columns, and norms are in
every file whole.

Source: ``llama/model.py`` of meta-llama/llama and meta-llama/llama3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, Chunk, TensorEntry
from dcpconv.core.errors import FormatError
from dcpconv.formats import torchfile

_NAME = re.compile(r"consolidated\.(\d\d)\.pth")
_CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "output": 0}
"""Dim that is cut, by the module's last name."""


def name(rank: int) -> str:
    """File of a rank.

    >>> name(3)
    'consolidated.03.pth'
    """
    return f"consolidated.{rank:02d}.pth"


def is_split(path: Path) -> bool:
    """Whether a directory holds a release in several files."""
    return path.is_dir() and sum(1 for file in path.iterdir() if _NAME.fullmatch(file.name)) > 1


def is_part(path: Path) -> bool:
    """Whether a file is one rank's share of such a release."""
    return _NAME.fullmatch(path.name) is not None and path.is_file() and is_split(path.parent)


def read_catalog(path: Path) -> Catalog:
    """Everything in the files of a directory, each tensor as one.

    Raises:
        FormatError: A file is missing, or the files do not hold shares of the same tensors.
    """
    found = sorted(file.name for file in path.iterdir() if _NAME.fullmatch(file.name))
    missing = [name(rank) for rank in range(len(found)) if name(rank) not in found]
    if missing:
        raise FormatError(
            "a model-parallel release lacks files",
            [("directory", path), *(("missing", item) for item in missing)],
            hint="fetch them; the others cannot be used without",
        )
    catalogs = [torchfile.read_catalog(path / item) for item in found]
    first = catalogs[0]
    _agree(path, found, catalogs)
    norm = first.tensors.get("norm.weight")
    hidden = norm.shape[0] if norm is not None and norm.shape else None
    tensors = {
        key: _joined([catalog.tensors[key] for catalog in catalogs], cut_of(entry, hidden))
        for key, entry in first.tensors.items()
    }
    files = {file: size for catalog in catalogs for file, size in catalog.files.items()}
    note = f"{len(found)} model-parallel files are read as one model"
    notes = dict.fromkeys([*(note for catalog in catalogs for note in catalog.notes), note])
    identities = {file: one for catalog in catalogs for file, one in catalog.identities.items()}
    return replace(
        first,
        source=path,
        path=path,
        files=files,
        tensors=tensors,
        notes=tuple(notes),
        identities=identities,
    )


def cut_of(entry: TensorEntry, hidden: int | None) -> int | None:
    """The dim along which a tensor is cut, or ``None`` where every file holds it whole.

    Args:
        entry: One file's share, or the whole tensor.
        hidden: Width of the model.  Releases before Llama 3 cut the embedding along it, later ones
            along the vocabulary.

    Raises:
        FormatError: A matrix of a module that no release has.
    """
    parts = entry.key.split(".")
    if len(entry.shape) < 2:
        return None
    if parts[-2:] == ["tok_embeddings", "weight"]:
        return 0 if hidden in {None, entry.shape[1]} else 1
    module = parts[-2] if len(parts) > 1 else ""
    if module not in _CUT:
        raise FormatError(
            "no rule says how this tensor is cut",
            [("key", entry.key), ("expected", f"a weight of {', '.join(_CUT)}")],
        )
    return _CUT[module]


def _joined(shares: Sequence[TensorEntry], dim: int | None) -> TensorEntry:
    if dim is None:
        return shares[0]
    chunks: list[Chunk] = []
    start = 0
    for share in shares:
        for chunk in share.chunks:
            offsets = tuple(o + start * (d == dim) for d, o in enumerate(chunk.offsets))
            chunks.append(replace(chunk, offsets=offsets))
        start += share.shape[dim]
    shape = tuple(start if d == dim else n for d, n in enumerate(shares[0].shape))
    return replace(shares[0], shape=shape, chunks=tuple(chunks))


def _agree(path: Path, names: Sequence[str], catalogs: Sequence[Catalog]) -> None:
    def outline(catalog: Catalog) -> Mapping[str, object]:
        return {key: (entry.dtype, entry.shape) for key, entry in catalog.tensors.items()}

    first = outline(catalogs[0])
    facts = []
    for item, catalog in zip(names[1:], catalogs[1:], strict=True):
        other = outline(catalog)
        differing = sorted(
            key for key in first.keys() | other.keys() if first.get(key) != other.get(key)
        )
        if differing:
            facts.append((item, f"differs from {names[0]} in {', '.join(differing[:4])}"))
    if facts:
        raise FormatError("the files are not shares of one model", [("directory", path), *facts])
