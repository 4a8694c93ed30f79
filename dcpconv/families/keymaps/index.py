"""What the tables say before their keys, and which keys each knows, without reading the tables.

``tables/index.json`` is written by ``make docs``.  It holds the size of every table, so that one
that was edited since is read anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from dcpconv.families.keymaps.building import TABLES, sound_keymap
from dcpconv.families.keymaps.table import Keymap

TABLE_INDEX = TABLES / "index.json"


OTHER_BASES: Final = ("", "transformer.")
"""What stands before the keys of a base model where it is not what its table says: nothing if it is
saved alone, ``transformer`` in classes for question answering."""


class Head(NamedTuple):
    """What the index says of a table.

    Attributes:
        nbytes: Size of its file.
        like: The table whose rows it took over.
        kept: What keys begin with that are kept as they are stored.
        base: What stands before the keys of the base model.
        templates: Keys that it knows, with ``{}`` for every number.
    """

    nbytes: int
    name: str
    family: str
    config: str
    also: Collection[str]
    architectures: Collection[str]
    by_name: bool
    like: str
    kept: Collection[str]
    base: str
    templates: frozenset[str]

    def knows_some(self, keys: Collection[str]) -> bool:
        """Whether one of these templates is of the table, whatever stands before its base model."""
        return any(self._knows(key) for key in keys)

    def knows_all(self, keys: Collection[str]) -> bool:
        """Whether every one of them is."""
        kept = tuple(self.kept)
        return all(self._knows(key) or key.startswith(kept) for key in keys)

    def _knows(self, key: str) -> bool:
        if key in self.templates:
            return True
        base = self.base
        return bool(base) and any(
            base + key[len(other) :] in self.templates
            for other in OTHER_BASES
            if key.startswith(other)
        )

    @property
    def file(self) -> Path:
        """The table."""
        return TABLES / f"{self.name}.toml"


def head_of(file: Path) -> Head:
    """What the index should say of a table."""
    table = sound_keymap(file)
    return Head(
        file.stat().st_size,
        table.name,
        table.family,
        table.config,
        table.also,
        table.architectures,
        table.by_name,
        table.like,
        [part.prefix for part in table.kept],
        table.base,
        table.templates,
    )


class Tables(Mapping[str, Keymap]):
    """The tables that come with the package, in the order of their names; one is read when it is
    asked for."""

    def __init__(self) -> None:
        with os.scandir(TABLES) as entries:
            sizes = {
                entry.name.removesuffix(".toml"): entry.stat().st_size
                for entry in entries
                if entry.name.endswith(".toml")
            }
        known = {head.name: head for head in _indexed()}

        def is_current(name: str) -> bool:
            head = known.get(name)
            if head is None or head.nbytes != sizes[name]:
                return False
            return not head.like or is_current(head.like)

        self.heads: Mapping[str, Head] = {
            name: known[name] if is_current(name) else head_of(TABLES / f"{name}.toml")
            for name in sorted(sizes)
        }
        self.read: dict[str, Keymap] = {}
        """Those that someone has asked for."""

    def __getitem__(self, name: str) -> Keymap:
        if name not in self.read:
            self.read[name] = sound_keymap(self.heads[name].file)
        return self.read[name]

    def __contains__(self, name: object) -> bool:
        return name in self.heads

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)


@lru_cache(maxsize=1)
def tables() -> Tables:
    """The tables; the index is read once."""
    return Tables()


def _indexed() -> list[Head]:
    try:
        rows: list[list[Any]] = json.loads(TABLE_INDEX.read_text(encoding="utf-8"))
        return [Head._make([*row[:-1], frozenset(row[-1])]) for row in rows]
    except (OSError, ValueError, TypeError):
        return []  # it is only a short cut


def index_text() -> str:
    """The index as it should be, a table a line."""
    heads = (head_of(TABLES / f"{name}.toml") for name in sorted(tables()))
    lines = (json.dumps([*head[:-1], sorted(head.templates)]) for head in heads)
    return "[\n" + ",\n".join(lines) + "\n]\n"
