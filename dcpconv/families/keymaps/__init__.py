"""Namings as tables: which key holds which slot of the canonical model, stored in which layout.

The tables are the ``*.toml`` files in ``tables/``; a user's own file has the same format (see
``docs/keymaps.md``).  A *slot* is a place in the canonical model, such as ``layer.q``; two families
that share a slot can be converted into each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from dcpconv.core.errors import KeymapError
from dcpconv.families.keymaps.reading import Head, read_head, read_keymap
from dcpconv.families.keymaps.table import Keymap, Match, Row, split_key

__all__ = [
    "Keymap",
    "Match",
    "Row",
    "families",
    "is_known",
    "keymaps",
    "read_keymap",
    "resolve_family",
    "split_key",
    "tables_for",
]

_TABLES = Path(__file__).parent / "tables"


class _Tables(Mapping[str, Keymap]):
    """The tables that come with the package; one is read when it is asked for.

    Reading all of them takes longer than most checks, and few are ever needed at once.
    """

    def __init__(self) -> None:
        paths = sorted(_TABLES.glob("*.toml"), key=lambda path: path.stem)
        self._heads = {head.name: head for head in map(read_head, paths)}
        self._read: dict[str, Keymap] = {}

    def __getitem__(self, name: str) -> Keymap:
        if name not in self._read:
            self._read[name] = read_keymap(self._heads[name].file)
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._heads

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    @property
    def heads(self) -> Mapping[str, Head]:
        """What each table says before its keys."""
        return self._heads


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    return _Tables()


def keymaps() -> Mapping[str, Keymap]:
    """The tables that come with the package, by name."""
    return _tables()


def tables_for(architecture: str) -> list[Keymap]:
    """The tables for models of one architecture; the others are not read."""
    tables = _tables()
    return [
        tables[name] for name, head in tables.heads.items() if architecture in head.architectures
    ]


def is_known(architecture: str) -> bool:
    """Whether any table is for models of this architecture; no table is read."""
    return any(architecture in head.architectures for head in _tables().heads.values())


def families() -> Iterator[tuple[str, list[Keymap]]]:
    """The tables grouped by what users call them."""
    groups: dict[str, list[Keymap]] = {}
    for table in keymaps().values():
        groups.setdefault(table.family, []).append(table)
    yield from groups.items()


def resolve_family(name: str, architecture: str | None = None) -> Keymap:
    """The table a user means by ``name``.

    Args:
        name: A table's name, or a family's (``hf``), which ``architecture`` narrows down.
        architecture: ``ModelSpec.architecture`` of the model, if known.

    Raises:
        KeymapError: No such family, or none of its tables is for this architecture.
    """
    tables = _tables()
    if name in tables:
        return tables[name]
    group = [head for head in tables.heads.values() if name in (head.family, *head.also)]
    if not group:
        known = ", ".join(sorted({head.family for head in tables.heads.values()}))
        raise KeymapError(
            f"there is no family {name!r}",
            [("families", known)],
            hint="`dcpconv families` lists them; --keymap FILE adds your own",
        )
    if architecture is None and len(group) == 1:
        return tables[group[0].name]
    for head in group:
        if architecture in head.architectures:
            return tables[head.name]
    raise KeymapError(
        f"family {name!r} has no table for architecture {architecture!r}",
        [("tables", ", ".join(head.name for head in group))],
        hint="name one of them, or describe the model with --keymap FILE",
    )
