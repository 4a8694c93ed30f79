"""A table from the fields of its TOML file, which are taken to keep the rules."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcpconv.core.layout import Layout
from dcpconv.families.keymaps.table import Keymap, Pattern, Row, Tie

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def sound_keymap(path: Path) -> Keymap:
    """Reads a table that comes with the package, without checking it: tests have done that."""
    return keymap_of(tomllib.loads(path.read_text(encoding="utf-8")), path)


def keymap_of(table: Mapping[str, Any], file: Path) -> Keymap:
    """The table that a file describes.

    Args:
        table: The file as ``reading`` would accept it.
        file: Where it was read.
    """
    name = table["name"]
    return Keymap(
        name=name,
        title=table.get("title") or name,
        family=table.get("family") or name,
        config=table.get("config", ""),
        architectures=tuple(table.get("architectures", ())),
        root=table.get("root", ""),
        rows=tuple(row_of(*item) for item in table["keys"].items()),
        ties=tuple(tie_of(*item) for item in table.get("tied", {}).items()),
        ignored=_reasons(table.get("ignore", {})),
        aside=_reasons(table.get("aside", {})),
        source=table.get("source", ""),
        file=file,
        also=tuple(table.get("also", ())),
        always=tuple(table.get("always", ())),
        derived=table.get("derived", {}),
        beyond=table.get("beyond", {}),
        same_sizes=table.get("same_sizes", {}),
        by_name=table.get("by_name", False),
        hints=table.get("hints", {}),
        facts=table.get("spec", {}),
        published=tuple(table.get("published", ())),
    )


def row_of(key: str, said: tuple[str, ...]) -> Row:
    """``key = [slots, layout, condition]``; a wrong layout is a ``LayoutError``."""
    slots = tuple(slot.strip() for slot in said[0].split("|"))
    return Row(Pattern(key), slots, Layout(said[1]), said[2] if len(said) == 3 else "")


def tie_of(key: str, said: str | tuple[str, str]) -> Tie:
    """``key = owner`` or ``key = [owner, "omitted"]``."""
    return (
        Tie(key, said, omitted=False) if isinstance(said, str) else Tie(key, said[0], omitted=True)
    )


def _reasons(table: Mapping[str, str]) -> tuple[tuple[Pattern, str], ...]:
    return tuple((Pattern(key), reason) for key, reason in table.items())
