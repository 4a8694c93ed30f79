"""Meta's model-parallel releases: ``consolidated.00.pth``, ``consolidated.01.pth``, ... as one.

Every file holds its share of each matrix.  Which dim was cut follows from the layer: fairscale's
``ColumnParallelLinear`` cuts rows of the weight and its bias, ``RowParallelLinear`` columns of the
weight alone, and norms are in every file whole.  What Llama 4 keeps end to end in one matrix
(queries, keys and values; gate and up; all experts) is cut each by itself.

Source: ``llama/model.py`` of meta-llama/llama and meta-llama/llama3; ``llama4/model.py``,
``llama4/moe.py``, ``llama4/vision`` and ``reshard_mp`` in ``checkpoint.py`` of llama-models 0.3.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, Chunk, Extent, Shapes, TensorEntry, c_strides
from dcpconv.core.errors import FormatError
from dcpconv.formats import torchfile
from dcpconv.formats.torchfile.meta_scales import SCALE, are_beside, with_scales

_NAME = re.compile(r"consolidated\.(\d\d)\.pth")
_ROWS = frozenset(
    {
        *("wq", "wk", "wv", "wqkv", "w1", "w3", "output"),
        *("w_in_shared_FD", "w_swiglu_FD", "c_fc", "_linear", "vision_projection"),
    }
)
"""Modules whose rows are cut, and their biases with them."""
_COLUMNS = frozenset({"wo", "w2", "w_out_shared_DF", "c_proj"})
"""Modules whose columns are cut; their biases are in every file whole."""
_ALONE: Mapping[str, int] = {
    "mlp.fc1_weight": 0,
    "mlp.fc2_weight": 1,
    "experts.moe_w_in_eD_F": 1,
    "experts.moe_w_swiglu_eD_F": 1,
    "experts.moe_w_out_eF_D": 0,
    "experts.w1": 2,
    "experts.w3": 2,
    "experts.w2": 1,
    f"experts.moe_w_in_eD_F{SCALE}": 1,
    f"experts.moe_w_swiglu_eD_F{SCALE}": 1,
    f"experts.moe_w_out_eF_D{SCALE}": 0,
}
"""Dim that is cut of tensors that are no module's ``weight``, by the last two names."""
_WHOLE = re.compile(
    r"(router_DE|positional_embedding(_vlm)?|expert_activation_DE|(global|running)_gate_stats_3E)$"
)
"""Matrices that are in every file whole."""

_MOST_EXPERTS = 1 << 12
"""Of a layer; releases have up to 128, and every one is a box of its own."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is shared out over files.

    Attributes:
        dim: The dim along which every file holds a part.
        lengths: Of what lies end to end along it, of which every file holds a part each: queries,
            keys and values.  In elements; their sum is the length of the dim.  More than one only
            along the first dim.
    """

    dim: int
    lengths: tuple[int, ...]


def name(rank: int) -> str:
    """File of a rank.

    >>> name(3)
    'consolidated.03.pth'
    """
    return f"consolidated.{rank:02d}.pth"


def is_split(path: Path) -> bool:
    """Whether a directory holds a release in several files, be it weights and their scales."""
    if not path.is_dir():
        return False
    return are_beside(path) or sum(1 for file in path.iterdir() if _NAME.fullmatch(file.name)) > 1


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
    catalogs = with_scales(path, [torchfile.read_catalog(path / item) for item in found])
    first = catalogs[0]
    _agree(path, found, catalogs)
    norm = first.tensors.get("norm.weight")
    hidden = norm.shape[0] if norm is not None and norm.shape else None
    shapes = {key: entry.shape for key, entry in first.tensors.items()}
    tensors = {
        key: _joined([catalog.tensors[key] for catalog in catalogs], cut_of(key, shapes, hidden))
        for key in first.tensors
    }
    files = {file: size for catalog in catalogs for file, size in catalog.files.items()}
    note = f"{len(found)} model-parallel files are read as one model"
    own = [note for catalog in catalogs for note in catalog.notes]
    notes = dict.fromkeys([*own, note] if len(found) > 1 else own)
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


def cut_of(key: str, shapes: Shapes, hidden: int | None) -> Cut | None:
    """How a tensor is cut, or ``None`` where every file holds it whole.

    Args:
        key: Which tensor.
        shapes: Of all tensors: either every one whole, or every one as one file has it.
        hidden: Width of the model.  Releases before Llama 3 cut the embedding along it, later ones
            along the vocabulary.

    Raises:
        FormatError: A matrix of a module that no release has, or one that does not consist of
            what it should.
    """
    shape = shapes[key]
    *_, module, leaf = ("", "", *key.split("."))
    alone = _ALONE.get(f"{module}.{leaf}")
    if alone is not None and alone < len(shape):
        return Cut(alone, _lengths(key, shapes, alone))
    if leaf in {"weight", "bias"} and module in _ROWS and shape:
        return Cut(0, _lengths(key, shapes, 0))
    if len(shape) < 2 or _WHOLE.search(key):
        return None
    if leaf == "weight" and module in _COLUMNS:
        return Cut(1, shape[1:2])
    if leaf == "weight" and module == "tok_embeddings":
        dim = 0 if hidden in {None, shape[1]} else 1
        return Cut(dim, shape[dim : dim + 1])
    modules = ", ".join(sorted({*_ROWS, *_COLUMNS, "tok_embeddings"}))
    raise FormatError(
        "no rule says how this tensor is cut",
        [("key", key), ("expected", f"a weight of {modules}")],
    )


def _lengths(key: str, shapes: Shapes, dim: int) -> tuple[int, ...]:
    """What lies end to end along a dim; itself, for most."""
    whole = shapes[key][dim]
    lengths: tuple[int, ...] = (whole,)
    other = ""
    if 0 in shapes[key]:
        return lengths
    if key.endswith("mlp.fc1_weight"):
        lengths = (whole // 2,) * 2
    elif key.endswith("wqkv.weight"):
        # As many queries as the output projection takes; the rest are keys and values.
        other = key.removesuffix("wqkv.weight") + "wo.weight"
        queries = shapes.get(other, (0, 0))[1]
        lengths = (queries, *((whole - queries) // 2,) * 2)
    elif key.endswith("moe_w_out_eF_D"):
        other = key.removesuffix("experts.moe_w_out_eF_D") + "router_DE"
        experts = shapes.get(other, (0, 0))[1]
        is_so = 0 < experts <= min(whole, _MOST_EXPERTS)
        lengths = (whole // experts,) * experts if is_so else ()
    elif key.endswith(f"moe_w_out_eF_D{SCALE}"):
        # A file has a scale per expert and column of its share of the rows.
        lengths = (1,) * whole if whole <= _MOST_EXPERTS else ()
    if sum(lengths) != whole or min(lengths, default=-1) < 0:
        beside = [(other, list(shapes[other]) if other in shapes else "missing")] if other else []
        raise FormatError(
            "this tensor does not consist of equal parts",
            [("key", key), ("shape", list(shapes[key])), *beside],
            hint="the file is not of one of Meta's Llama 4 releases",
        )
    return lengths


def _joined(shares: Sequence[TensorEntry], cut: Cut | None) -> TensorEntry:
    if cut is None:
        return shares[0]
    dim, first, count = cut.dim, shares[0], len(shares)
    chunks: list[Chunk] = []
    before = 0
    for length in cut.lengths:
        for rank, share in enumerate(shares):
            move = (count - 1) * before + rank * length
            for chunk in share.chunks:
                chunks.extend(_within(chunk, first.dtype.itemsize, dim, before, length, move))
        before += length
    shape = tuple(count * n if d == dim else n for d, n in enumerate(first.shape))
    return replace(first, shape=shape, chunks=tuple(chunks))


def _within(
    chunk: Chunk, itemsize: int, dim: int, start: int, length: int, move: int
) -> Iterator[Chunk]:
    """What a chunk has of a stretch of a dim, so many elements further along it."""
    low = max(start, chunk.offsets[dim])
    high = min(start + length, chunk.offsets[dim] + chunk.sizes[dim])
    if low >= high:
        return
    offsets = tuple(low + move if d == dim else o for d, o in enumerate(chunk.offsets))
    if high - low == chunk.sizes[dim]:
        yield replace(chunk, offsets=offsets)
        return
    strides = chunk.strides or c_strides(chunk.sizes)
    skipped = (low - chunk.offsets[dim]) * strides[dim] * itemsize
    sizes = tuple(high - low if d == dim else n for d, n in enumerate(chunk.sizes))
    last = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    nbytes = (last + 1) * itemsize if all(sizes) else 0
    extent = Extent(chunk.extent.file, chunk.extent.offset + skipped, nbytes)
    yield Chunk(offsets, sizes, extent, None if strides == c_strides(sizes) else strides)


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
