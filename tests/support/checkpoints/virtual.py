"""Checkpoints that exist only in memory: every key of a table, and plans carried out by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from dcpconv.core.catalog import Catalog, Chunk, Extent, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.outline import Fill, Loop
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap
from dcpconv.plan.coverage import Coverage
from dcpconv.plan.fills import fill_of
from dcpconv.sources.parameter_shapes import expected

_INT32 = BY_NAME["int32"]


@dataclass(frozen=True, slots=True)
class Virtual:
    """A checkpoint in memory.

    Attributes:
        catalog: Its tensors, all in one file.
        words: What the file holds, one number per element.
    """

    catalog: Catalog
    words: list[int]

    def tensor(self, key: str) -> tuple[tuple[int, ...], list[int]]:
        """Shape and elements of a tensor in C order."""
        entry = self.catalog.tensors[key]
        start = entry.chunks[0].extent.offset // 4
        return entry.shape, self.words[start : start + entry.numel]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], list[int]]]:
        """Every tensor."""
        return {key: self.tensor(key) for key in self.catalog.tensors}


def laid_out(tensors: Mapping[str, tuple[tuple[int, ...], list[int]]]) -> Virtual:
    """A checkpoint of these tensors."""
    entries: dict[str, TensorEntry] = {}
    words: list[int] = []
    for key, (shape, elements) in tensors.items():
        extent = Extent("all", 4 * len(words), 4 * len(elements))
        chunk = Chunk((0,) * len(shape), shape, extent)
        entries[key] = TensorEntry(key, _INT32, shape, (chunk,))
        words.extend(elements)
    catalog = Catalog("torch", Path(), Path("virtual"), {"all": 4 * len(words)}, entries)
    return Virtual(catalog, words)


def checkpoint(table: Keymap, spec: ModelSpec, *, seed: int = 0) -> Virtual:
    """Every tensor that ``table`` has of a model, each element with a number of its own."""
    found = {}
    count = 0
    for key, shape, _ in expected(table, spec):
        assert shape is not None, f"{key} has an axis whose size the spec lacks"
        numel = 1
        for size in shape:
            numel *= size
        found[key] = (shape, list(range(count, count + numel)))
        count += numel
    keys = list(found)
    random.Random(seed).shuffle(keys)
    return laid_out({key: found[key] for key in keys})


def slots_of(table: Keymap, spec: ModelSpec) -> set[str]:
    """Slots of the tensors that a model has in a naming."""
    return {slot for _, _, slots in expected(table, spec) for slot in slots}


def carried_out(coverage: Coverage, source: Virtual) -> Virtual:
    """The result of a conversion, element by element, without what only a config supplies."""
    made = {}
    for target in coverage.targets:
        if target.values is not None:
            continue
        fill = fill_of(target, (0,) * len(target.shape), target.shape)
        made[target.key] = (target.shape, _elements(fill, source.words))
    return laid_out(made)


def _elements(fill: Fill, words: list[int]) -> list[int]:
    into = [-1] * fill.numel
    for part in fill.parts:
        for read, write in _steps(part.loops):
            assert into[part.target + write] == -1, "an element is written twice"
            into[part.target + write] = words[part.offset // 4 + read]
    assert -1 not in into, "an element is left out"
    return into


def _steps(loops: tuple[Loop, ...]) -> Iterator[tuple[int, int]]:
    for at in product(*(range(count) for count, _, _ in loops)):
        read = sum(i * source for i, (_, source, _) in zip(at, loops, strict=True))
        write = sum(i * target for i, (_, _, target) in zip(at, loops, strict=True))
        yield read, write
