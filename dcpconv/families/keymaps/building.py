"""A table from the fields of its TOML file, which are taken to keep the rules."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcpconv.core.errors import KeymapError
from dcpconv.core.layout import Layout
from dcpconv.core.spec import Declared
from dcpconv.families.keymaps.table import Kept, Keymap, Pattern, Row, Tie

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


TABLES = Path(__file__).parent / "tables"

_OTHERS = ("tied", "ignore", "aside", "derived", "beyond", "idle", "axes", "kinds", "kept")
"""Sections beside the keys that a table takes over where it does not state them."""

_WITH_KEYS = ("keys", "ignore", "aside", "derived")
"""Sections by key, besides ``tied``."""


def sound_keymap(path: Path) -> Keymap:
    """Reads a table that comes with the package, without checking it: tests have done that."""
    return keymap_of(complete(tomllib.loads(path.read_text(encoding="utf-8"))), path)


def complete(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with what it takes over from the one that it is ``like``.

    Its own rows stand in place of those that hold the same slots, and rows that hold a slot which
    it is ``without`` are left out.  Another section is taken over if it states none of its own, as
    far as the keys are still there.  Where keys have ``moved``, they begin otherwise.

    Raises:
        KeymapError: There is no such table.
    """
    name, own = table.get("like"), dict(table)
    if not isinstance(name, str) or not name:
        return own
    file = TABLES / f"{name}.toml"
    if file not in TABLES.glob("*.toml"):
        raise KeymapError(
            "the table that this one is like does not exist",
            [("like", name)],
            hint="`dcpconv families` lists the tables",
        )
    base = _moved(complete(tomllib.loads(file.read_text(encoding="utf-8"))), own.get("moved", {}))
    rows: dict[str, Any] = dict(own.get("keys", {}))
    gone = {slot for said in rows.values() for slot in slots_of(said)} | set(own.get("without", ()))
    places: dict[str, Any] = {}
    for key, said in base["keys"].items():
        replaced = gone & set(slots_of(said))
        if not replaced and key not in rows:
            places[key] = said
        for mine in [k for k, what in rows.items() if replaced & set(slots_of(what))]:
            places[mine] = rows.pop(mine)
    merged = {part: own.get(part, base.get(part, {})) for part in _OTHERS}
    merged["keys"] = {**places, **rows}
    merged["tied"] = {k: v for k, v in merged["tied"].items() if _owner(v) in merged["keys"]}
    known = {*merged["keys"], *merged["ignore"]}
    merged["derived"] = {k: v for k, v in merged["derived"].items() if k in known}
    held = {slot for said in merged["keys"].values() for slot in slots_of(said)}
    always = [slot for slot in base.get("always", ()) if slot in held]
    return {**own, **merged, "always": own.get("always", always)}


def _moved(base: Mapping[str, Any], moved: Mapping[str, str]) -> Mapping[str, Any]:
    """A table with other beginnings of its keys: ``old -> new``."""
    if not moved:
        return base

    def key(old: str) -> str:
        return next((n + old[len(o) :] for o, n in moved.items() if old.startswith(o)), old)

    def owner(said: Any) -> Any:
        return key(said) if isinstance(said, str) else [key(said[0]), *said[1:]]

    parts = {part: {key(k): v for k, v in base.get(part, {}).items()} for part in _WITH_KEYS}
    tied = {key(k): owner(v) for k, v in base.get("tied", {}).items()}
    return {**base, **parts, "tied": tied}


def slots_of(said: Any) -> tuple[str, ...]:
    """The slots of a row as a table spells it."""
    return tuple(slot.strip() for slot in said[0].split("|"))


def _owner(said: str | tuple[str, str]) -> str:
    return said if isinstance(said, str) else said[0]


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
        like=table.get("like", ""),
        always=tuple(table.get("always", ())),
        derived=table.get("derived", {}),
        beyond=table.get("beyond", {}),
        idle=table.get("idle", {}),
        same_sizes=table.get("same_sizes", {}),
        by_name=table.get("by_name", False),
        hints=table.get("hints", {}),
        facts=table.get("spec", {}),
        published=tuple(table.get("published", ())),
        declared=declared_of(table.get("axes", {}), table.get("kinds", {})),
        kept=tuple(Kept(*item) for item in table.get("kept", {}).items()),
    )


def declared_of(axes: Mapping[str, Any], kinds: Mapping[str, Any]) -> Declared:
    """``[axes]`` with its ``[axes.KIND]``, and ``[kinds]``, of one rule each or a list of them."""
    return Declared(
        {name: rule for name, rule in axes.items() if isinstance(rule, str)},
        {name: rules for name, rules in axes.items() if not isinstance(rules, str)},
        {
            name: (rules,) if isinstance(rules, str) else tuple(rules)
            for name, rules in kinds.items()
        },
    )


def row_of(key: str, said: tuple[str, ...]) -> Row:
    """``key = [slots, layout, condition]``; a wrong layout is a ``LayoutError``."""
    return Row(Pattern(key), slots_of(said), Layout(said[1]), said[2] if len(said) == 3 else "")


def tie_of(key: str, said: str | tuple[str, str]) -> Tie:
    """``key = owner`` or ``key = [owner, "omitted"]``."""
    return (
        Tie(key, said, omitted=False) if isinstance(said, str) else Tie(key, said[0], omitted=True)
    )


def _reasons(table: Mapping[str, str]) -> tuple[tuple[Pattern, str], ...]:
    return tuple((Pattern(key), reason) for key, reason in table.items())
