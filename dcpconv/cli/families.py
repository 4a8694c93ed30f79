"""``dcpconv families``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcpconv.cli.answers import answers, say, say_json
from dcpconv.cli.words import count

if TYPE_CHECKING:
    from dcpconv.keymaps import Keymap


@answers
def families(
    name: Annotated[
        str | None, typer.Argument(metavar="[FAMILY]", help="Show one table in full.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The tables as JSON.")] = False,
) -> None:
    """List the namings that --to and --from take, or show one as a table of keys."""
    from dcpconv.keymaps import keymaps, resolve_family

    tables = [resolve_family(name)] if name else list(keymaps().values())
    if as_json:
        say_json([_as_json(table) for table in tables])
        return
    if name:
        _show(tables[0])
        return
    width = max(len(table.name) for table in tables)
    for table in tables:
        say(f"{table.name:<{width}}  {table.title}  ({count(len(table.rows), 'row')})")


def _show(table: Keymap) -> None:
    say(f"{table.name}: {table.title}")
    say(f"source: {table.source}")
    rows = [(r.pattern.text, " | ".join(r.slots), r.layout.text, r.when) for r in table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for key, slots, layout, when in rows:
        line = f"{key:<{widths[0]}}  {slots:<{widths[1]}}  {layout:<{widths[2]}}  {when}"
        say(line.rstrip())
    for tie in table.ties:
        say(f"{tie.key:<{widths[0]}}  = {tie.owner}{' (not in hf files)' if tie.omitted else ''}")
    for pattern, reason in table.ignored:
        say(f"{pattern.text:<{widths[0]}}  ignored: {reason}")


def _as_json(table: Keymap) -> dict[str, Any]:
    return {
        "name": table.name,
        "title": table.title,
        "family": table.family,
        "architectures": list(table.architectures),
        "root": table.root,
        "source": table.source,
        "keys": {
            row.pattern.text: {
                "slots": list(row.slots),
                "layout": row.layout.text,
                "when": row.when or None,
            }
            for row in table.rows
        },
        "tied": {tie.key: tie.owner for tie in table.ties},
        "ignored": {pattern.text: reason for pattern, reason in table.ignored},
    }
