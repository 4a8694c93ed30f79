"""``dcpconv families``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcpconv.cli.answers import answers, say, say_json
from dcpconv.cli.words import count
from dcpconv.core.errors import KeymapError

if TYPE_CHECKING:
    from dcpconv.families.keymaps import Keymap


@answers
def families(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[FAMILY|MODEL_TYPE|WORD|check|new]",
            help="The table to show, or the model_type or any word of a title whose tables to list;"
            " or `check` or `new`, for the table or checkpoint at PATH.",
        ),
    ] = None,
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PATH]", help="The table to check, or the checkpoint to draft for."
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SRC]", help="A checkpoint in the naming of the table to check, to prove it."
        ),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", metavar="FAMILY", help="What `check` converts SRC into.")
    ] = "hf",
    as_json: Annotated[bool, typer.Option("--json", help="The tables as JSON.")] = False,
) -> None:
    """List the namings that --to and --from take, or show one as a table of keys.

    Each line ends with the model types (model_type in config.json) that the naming is for;
    `families smollm3` lists the namings for one of them, `families falcon` those that a word finds.

    `families check my.toml` validates a table of your own, and `families new SRC` drafts one from
    the keys of a checkpoint and its config. `families check my.toml SRC --to hf-llama` proves one:
    it converts SRC and compares the logits of both models, if transformers has both classes.
    """
    from dcpconv.families.keymaps import is_known, keymaps, resolve_family

    if name in {"check", "new"}:
        if path is None:
            raise KeymapError(f"families {name} needs a path", [("expected", _USAGE[name])])
        if name == "new":
            _new(path)
        else:
            _check(path, source, to)
        return
    if path is not None:
        raise KeymapError(
            "a path goes with check or new", [("expected", usage) for usage in _USAGE.values()]
        )
    known = keymaps()
    is_list = name is None
    if name is None:
        tables = list(known.values())
    elif name not in known and is_known(name):
        tables, is_list = [t for t in known.values() if name in t.architectures], True
    else:
        try:
            tables = [resolve_family(name)]
        except KeymapError:
            tables, is_list = [t for t in known.values() if _has_word(t, name)], True
            if not tables:
                raise
    if as_json:
        say_json([_as_json(table) for table in tables])
        return
    if not is_list:
        _show(tables[0])
        return
    width = max(len(table.name) for table in tables)
    for table in tables:
        types = ", ".join(table.architectures)
        rows = count(len(table.rows), "row")
        say(f"{table.name:<{width}}  {table.title}  ({rows})  for {types}")


def _has_word(table: Keymap, word: str) -> bool:
    """Whether a word is in what a user may call a table: its names, its title, its models.

    A model card may have GPT-2 where the class has gpt2, so that only letters and digits count.
    """
    texts = (table.name, table.title, table.family, *table.architectures)
    return any(_letters(word) in _letters(text) for text in texts)


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


_USAGE = {
    "check": "dcpconv families check my.toml [SRC]",
    "new": "dcpconv families new SRC > my.toml",
}


def _check(path: Path, source: Path | None, to: str) -> None:
    from dcpconv.sources.drafting import checked_keymap, foreign_architectures, foreign_slots

    table = checked_keymap(path)
    say(f"{table.name}: {count(len(table.rows), 'row')}, {count(len(table.slots), 'slot')}, sound")
    for name in foreign_architectures(table):
        say(f"own model  {name}  no other family is for it")
    for slot in foreign_slots(table):
        say(f"own slot   {slot}  no other family has it")
    if source is None:
        return
    from dcpconv.cli.proving import RIGHT, logit_difference

    found = logit_difference(table, source, to)
    is_right = found < RIGHT
    say(f"logits     differ by {found:.1e} of their standard deviation, as {to}")
    if not is_right:
        say("no         this is another model: a layout or a slot is wrong")
        raise typer.Exit(1)


def _new(path: Path) -> None:
    from dcpconv.families.parameter_files import read_parameter_file
    from dcpconv.formats.opening import open_checkpoint
    from dcpconv.sources.drafting import draft
    from dcpconv.sources.explaining import Explanations

    beside = read_parameter_file(path)
    named = beside.architecture if beside is not None else ""
    said = Explanations(beside.fields, beside.spec) if beside is not None else None
    say(draft(open_checkpoint(path), architecture=named, said=said).rstrip("\n"))


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
    for key, rule in table.derived.items():
        say(f"{key:<{widths[0]}}  {rule}, where the source has none")
    for pattern, reason in table.ignored:
        say(f"{pattern.text:<{widths[0]}}  ignored: {reason}")
    for pattern, reason in table.aside:
        say(f"{pattern.text:<{widths[0]}}  kept in {table.aside_file}: {reason}")
    for part in table.kept:
        say(f"{part.prefix + '*':<{widths[0]}}  kept as stored: {part.role}")
    for axis, rule in table.declared.axes.items():
        say(f"axis {axis:<{widths[0] - 5}}  {rule}")
    for kind, axes in table.declared.of_kind.items():
        for axis, rule in axes.items():
            say(f"axis {axis:<{widths[0] - 5}}  {rule}, in layers of {kind}")
    for kind, rules in table.declared.kinds.items():
        say(f"kind {kind:<{widths[0] - 5}}  {', or '.join(rules)}")


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
        "derived": dict(table.derived),
        "ignored": {pattern.text: reason for pattern, reason in table.ignored},
        "aside": {pattern.text: reason for pattern, reason in table.aside},
        "kept": {part.prefix: part.role for part in table.kept},
        "axes": {**table.declared.axes, **table.declared.of_kind},
        "kinds": {kind: list(rules) for kind, rules in table.declared.kinds.items()},
    }
