"""Namings as tables: which key holds which slot of the canonical model, stored in which layout.

The tables are the ``*.toml`` files in ``tables/``; a user's own file has the same format (see
``docs/keymaps.md``).  A *slot* is a place in the canonical model, such as ``layer.q``; two families
that share a slot can be converted into each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from dcpconv.core.errors import KeymapError
from dcpconv.families.keymaps.index import tables
from dcpconv.families.keymaps.table import Keymap, Match, Pattern, Row, split_key

__all__ = [
    "Keymap",
    "Match",
    "Pattern",
    "Row",
    "is_known",
    "keymaps",
    "read_keymap",
    "resolve_family",
    "split_key",
    "tables_for",
]


def keymaps() -> Mapping[str, Keymap]:
    """The tables that come with the package, by name."""
    return tables()


def tables_for(
    architecture: str | None, readings: Collection[frozenset[str]], *, config: str = ""
) -> list[Keymap]:
    """The tables that may be the naming of a checkpoint; the others are not read.

    Where some tables know all keys of a reading, those that know only some are none of them.
    Without an architecture, tables that are ``by_name`` have to know all.

    Args:
        architecture: Of the model, or ``None`` for any.
        readings: Templates of its keys, once for every root that they may have.
        config: Whose parameter file lies beside it, whatever the keys are.
    """
    heads = [
        head
        for head in tables().heads.values()
        if architecture is None or architecture in head.architectures
        if any(head.knows_some(keys) for keys in readings)
    ]
    whole = {head.name for head in heads if any(head.knows_all(keys) for keys in readings if keys)}
    return [
        tables()[head.name]
        for head in heads
        if head.name in whole
        or (not whole and not (head.by_name and architecture is None))
        or (config and head.config == config)
    ]


def is_known(architecture: str) -> bool:
    """Whether any table is for models of this architecture; no table is read."""
    return any(architecture in head.architectures for head in tables().heads.values())


def read_keymap(path: Path) -> Keymap:
    """Reads and checks a table of the user's own.

    Raises:
        KeymapError: The file cannot be read, or breaks a rule; every problem is listed with its
            line.
    """
    from dcpconv.families.keymaps import reading  # noqa: PLC0415 - imports pydantic

    return reading.read_keymap(path)


def resolve_family(name: str, architecture: str | None = None) -> Keymap:
    """The table a user means by ``name``.

    Args:
        name: A table's name, or a family's (``hf``), which ``architecture`` narrows down.
        architecture: ``ModelSpec.architecture`` of the model, if known.

    Raises:
        KeymapError: No such family, or none of its tables is for this architecture.
    """
    if name in tables():
        return tables()[name]
    group = [head for head in tables().heads.values() if name in (head.family, *head.also)]
    if not group:
        known = ", ".join(sorted({head.family for head in tables().heads.values()}))
        raise KeymapError(
            f"there is no family {name!r}",
            [("families", known)],
            hint="`dcpconv families` lists them; --keymap FILE adds your own",
        )
    if architecture is None and len(group) == 1:
        return tables()[group[0].name]
    for head in group:
        if architecture in head.architectures:
            return tables()[head.name]
    raise KeymapError(
        f"family {name!r} has no table for architecture {architecture!r}",
        [("tables", ", ".join(head.name for head in group))],
        hint="name one of them, or describe the model with --keymap FILE",
    )
