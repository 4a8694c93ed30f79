"""Namings as tables: which key holds which slot of the canonical model, stored in which layout.

The tables are the ``*.toml`` files beside this module; a user's own file has the same format (see
``docs/keymaps.md``).  A *slot* is a place in the canonical model, such as ``layer.q``; two families
that share a slot can be converted into each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from dcpconv.errors import KeymapError
from dcpconv.keymaps.reading import read_keymap
from dcpconv.keymaps.table import Keymap, Match, Row, split_key

__all__ = [
    "Keymap",
    "Match",
    "Row",
    "families",
    "keymaps",
    "read_keymap",
    "resolve_family",
    "split_key",
]

_TABLES = Path(__file__).parent


@lru_cache(maxsize=1)
def keymaps() -> Mapping[str, Keymap]:
    """The tables that come with the package, by name."""
    paths = sorted(_TABLES.glob("*.toml"), key=lambda path: path.stem)
    tables = (read_keymap(path) for path in paths)
    return {table.name: table for table in tables}


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
    tables = keymaps()
    if name in tables:
        return tables[name]
    group = [table for table in tables.values() if name in (table.family, *table.also)]
    if not group:
        known = ", ".join(sorted({table.family for table in tables.values()}))
        raise KeymapError(
            f"there is no family {name!r}",
            [("families", known)],
            hint="`dcpconv families` lists them; --keymap FILE adds your own",
        )
    if architecture is None and len(group) == 1:
        return group[0]
    for table in group:
        if architecture in table.architectures:
            return table
    raise KeymapError(
        f"family {name!r} has no table for architecture {architecture!r}",
        [("tables", ", ".join(table.name for table in group))],
        hint="name one of them, or describe the model with --keymap FILE",
    )
