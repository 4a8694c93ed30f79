"""Which file, and so which rank, holds which box of which tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dcpconv.cli.pictures.treemaps import VIRIDIS
from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.numbers import size
from dcpconv.core.printing import printable
from dcpconv.families.keymaps import split_key

_MOST = 120
"""Pictures of tensors before the rest is only counted."""

_MOST_BOXES = 256
"""Boxes drawn of one tensor; of the others the sentence below it tells."""

_MOST_FILES = 400
"""Files listed before the rest is only counted."""

_SIDE = 200.0
"""Pixels of the longer side of a tensor."""

_RANK = re.compile(r"__(\d+)_\d+\.distcp$|rank[_-]?(\d+)")
"""Names of files that tell the rank that wrote them.

Source: torch 2.13 ``torch/distributed/checkpoint/filesystem.py`` (``__{rank}_{number}.distcp``);
FSDP trainers' ``*_rank_{rank}.pt``.
"""


def of_catalog(catalog: Catalog) -> list[dict[str, Any]]:
    """The map of the tensors that are stored in several boxes, and the list of all files."""
    label = {file: _label(file, number) for number, file in enumerate(sorted(catalog.files))}
    shade = {file: _shade(number, len(label)) for number, file in enumerate(label)}
    found: dict[object, list[TensorEntry]] = {}
    for entry in catalog.tensors.values():
        if len(entry.chunks) > 1:
            boxes = tuple((c.offsets, c.sizes, c.extent.file) for c in entry.chunks)
            found.setdefault((split_key(entry.key)[0], entry.shape, boxes), []).append(entry)
    sections = []
    if found:
        alike = sorted(found.values(), key=lambda some: -some[0].nbytes * len(some))
        more = f"  {len(alike) - _MOST:,} kinds more are not drawn." if len(alike) > _MOST else ""
        used = list(dict.fromkeys(c.extent.file for some in alike[:_MOST] for c in some[0].chunks))
        index = {file: number for number, file in enumerate(used)}
        sections.append(
            {
                "kind": "boxes",
                "title": "Shards: which file holds which box of which tensor",
                "hint": "The first dim runs down, the last across; dims between are laid over each"
                f" other.  Tensors that are cut alike are drawn once.{more}",
                "files": [[VIRIDIS[shade[f]], _ink(shade[f]), label[f]] for f in used],
                "tensors": [_tensor(some, label, index) for some in alike[:_MOST]],
            }
        )
    return [*sections, _files(catalog, label)]


def _tensor(
    alike: list[TensorEntry], label: Mapping[str, str], index: Mapping[str, int]
) -> list[Any]:
    entry = alike[0]
    rows, columns = _across(entry.shape)
    scale = _SIDE / max(rows, columns, 1)
    width, height = max(24.0, columns * scale), max(24.0, rows * scale)
    name = printable(split_key(entry.key)[0].replace("{}", "N"))
    of = f"{entry.dtype.label} {list(entry.shape)} in {len(entry.chunks):,} boxes"
    many = f", {len(alike):,} alike" if len(alike) > 1 else ""
    drawn = []
    for chunk in entry.chunks[:_MOST_BOXES]:
        top = chunk.offsets[0] if len(chunk.offsets) > 1 else 0
        left = chunk.offsets[-1] if chunk.offsets else 0
        tall, wide = _across(chunk.sizes)
        ranges = ", ".join(f"{o}:{o + n}" for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        file = chunk.extent.file
        text = (
            f"{name}[{ranges}]\n{label[file]}  {printable(file)}\n"
            f"{size(chunk.extent.nbytes)} at byte {chunk.extent.offset:,}"
        )
        box = (
            left / columns * width if columns else 0.0,
            top / rows * height if rows else 0.0,
            wide / columns * width if columns else width,
            tall / rows * height if rows else height,
        )
        drawn.append([*(round(value, 1) for value in box), index[file], text])
    return [f"{name}  {of}{many}", round(width, 1), round(height, 1), drawn]


def _across(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the picture; a vector is a row."""
    return (shape[0] if len(shape) > 1 else 1), (shape[-1] if shape else 1)


def _files(catalog: Catalog, label: Mapping[str, str]) -> dict[str, Any]:
    nbytes = dict.fromkeys(label, 0)
    tensors: dict[str, set[str]] = {file: set() for file in label}
    for entry in catalog.tensors.values():
        for chunk in entry.chunks:
            file = chunk.extent.file
            if file in nbytes:
                held = math.prod(chunk.sizes) * entry.dtype.itemsize
                nbytes[file] += held
                tensors[file].add(entry.key)
    rows = [
        [printable(file), label[file], size(nbytes[file]), f"{len(tensors[file]):,}"]
        for file in list(label)[:_MOST_FILES]
    ]
    if len(label) > _MOST_FILES:
        rows.append([f"and {len(label) - _MOST_FILES:,} more", "", "", ""])
    return {
        "kind": "list",
        "title": f"Files: {len(label):,}",
        "columns": ["file", "written by", "tensor data", "tensors"],
        "numbers": [2, 3],
        "rows": rows,
    }


def _label(file: str, number: int) -> str:
    found = _RANK.search(file)
    return f"rank {found[1] or found[2]}" if found else f"file {number}"


def _shade(number: int, count: int) -> int:
    """Neighbours in unlike shades: the ten colours are walked in steps of three."""
    return number * 3 % 10 if count > 3 else (number * 4) % 10


def _ink(shade: int) -> str:
    return "#fff" if shade >= 5 else "#000"
