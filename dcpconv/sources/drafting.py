"""A user's own table: drafted from a checkpoint's keys, and checked against ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.errors import KeymapError
from dcpconv.core.layout import Layout
from dcpconv.families.keymaps import Keymap, is_known, keymaps, read_keymap, split_key
from dcpconv.families.keymaps.reading import line_of
from dcpconv.sources.explaining import Explanations
from dcpconv.sources.recognition import recognise

_INDEX_AFTER = {"shared_experts": "S", "experts": "E", "layers": "L", "layer": "L", "blocks": "L"}
"""Component of a key -> index that the number behind it counts; ``h`` and ``block`` are guessed
from being the first number."""


@dataclass(frozen=True, slots=True)
class _Guess:
    """One row of a draft.

    Attributes:
        key: Pattern with named indices.
        slot: Best guess, or empty.
        layout: Best guess, or empty.
        shape: What the checkpoint has.
        remark: Why a person should look.
        when: Kind of the layers that have it; empty for all.
    """

    key: str
    slot: str
    layout: str
    shape: tuple[int, ...]
    remark: str
    when: str = ""


def checked_keymap(path: Path) -> Keymap:
    """A user's table that also agrees with the tables that come with the package.

    Raises:
        KeymapError: The file breaks a rule, holds a slot with other axes than ours, or names a
            parameter file that no table of ours is for; every problem points to its line.
    """
    table = read_keymap(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    ours = _axes_by_slot()
    problems = []
    for row in table.with_axes(table.same_sizes).rows:
        line = line_of(lines, (row.pattern.text,))
        for term, slot in enumerate(row.slots):
            known = ours.get(slot)
            axes = row.canonical_axes(term)
            if known is not None and axes not in known:
                wanted = " ".join(min(sorted(axes) for axes in known))
                what = f"{slot} has the axes {wanted}, here {' '.join(sorted(axes))}"
                problems.append((f"{path.name}:{line}", f"{row.pattern.text}: {what}"))
    configs = {ours.config for ours in keymaps().values()}
    if table.config and table.config not in configs:
        line = line_of(lines, ("config",))
        what = f"config: {table.config} is none of {', '.join(sorted(configs))}"
        problems.append((f"{path.name}:{line}", what))
    if table.name in keymaps():
        problems.append((f"{path.name}:1", f"the name {table.name} is taken by one of ours"))
    if problems:
        raise KeymapError("the keymap does not agree with the other tables", problems)
    return table


def foreign_architectures(table: Keymap) -> list[str]:
    """Models that none of our tables is for: a new one, or one that is spelled otherwise."""
    return [name for name in table.architectures if not is_known(name)]


def foreign_slots(table: Keymap) -> list[str]:
    """Slots that none of our tables has: only this table can hold them."""
    ours = _axes_by_slot()
    return sorted(slot for slot in table.slots if slot not in ours)


def draft(
    catalog: Catalog,
    *,
    name: str = "my-family",
    architecture: str = "",
    said: Explanations | None = None,
) -> str:
    """The text of a table for a checkpoint whose naming no table knows.

    Slots and layouts are guessed from the ends of keys and from shapes; every guess that needs a
    person's eye says so.

    Args:
        catalog: The checkpoint.
        name: What the table shall be called.
        architecture: What the parameter file beside it names.
        said: What that file says of shapes and of kinds of layers.
    """
    said = said or Explanations({}, None)
    entries = recognise(catalog).entries
    guesses = _in_some_layers(_guesses(entries, said), entries, said)
    keys = [guess for guess in guesses if guess.slot]
    unknown = [guess for guess in guesses if not guess.slot]
    width = max((len(guess.key) + 2 for guess in keys), default=0)
    slots = max((len(guess.slot) + 3 for guess in keys), default=0)
    layouts = max((len(guess.layout) + 3 for guess in keys), default=0)
    lines = [
        f"# Drafted from {catalog.source.name}; look at every line, then run",
        "# `dcpconv families check` on this file.",
        f'name          = "{name}"',
        'title         = ""',
        f'architectures = ["{architecture or "llama"}"]   # model_type of the models it is for',
        'source        = ""          # where the facts come from',
        *_section("axes", said.axes),
        *_section("kinds", said.kinds),
        "",
        "[keys]",
    ]
    for guess in keys:
        key, slot, layout = f'"{guess.key}"', f'"{guess.slot}",', f'"{guess.layout}"]'
        if guess.when:
            layout = f'"{guess.layout}", "{guess.when}"]'
        shape = f"# {list(guess.shape)}{f'  {guess.remark}' if guess.remark else ''}"
        lines.append(f"{key:<{width}} = [{slot:<{slots}} {layout:<{layouts}}   {shape}")
    if unknown:
        lines += ["", "# Not guessed: move each to [keys], or to [ignore] with a reason."]
        for guess in unknown:
            when = f', "{guess.when}"' if guess.when else ""
            row = f'# "{guess.key}" = ["", "{guess.layout}"{when}]'
            lines.append(f"{row}   # {list(guess.shape)}{guess.remark and f'  {guess.remark}'}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _section(name: str, rules: Mapping[str, str]) -> list[str]:
    width = max((len(key) for key in rules), default=0)
    lines = [f'{key:<{width}} = "{rule}"' for key, rule in rules.items()]
    return ["", f"[{name}]", *lines] if lines else []


def _in_some_layers(
    guesses: Iterable[_Guess], entries: Mapping[str, TensorEntry], said: Explanations
) -> list[_Guess]:
    """The guesses with the kind of the layers that have them, and layouts for those without."""
    layers: dict[str, set[int]] = {}
    for key in entries:
        pattern, numbers = _pattern(key)
        if "{L}" in pattern:
            layers.setdefault(pattern, set()).add(numbers["L"])
    count = max((max(some) + 1 for some in layers.values()), default=0)
    found = []
    kinds = {
        key: (frozenset(some), re.sub(r"[^a-z]+", "_", key.partition("{L}.")[2].partition(".")[0]))
        for key, some in layers.items()
    }
    if said.fields:
        for has, block in kinds.values():
            said.condition(has, count, block)  # the rest of a kind may come before it
    for guess in guesses:
        layout = guess.layout if guess.slot else said.layout(guess.shape)
        when, remark = "untied" if guess.slot == "head" else "", guess.remark
        if guess.key in kinds and said.fields:
            kind = said.condition(kinds[guess.key][0], count, kinds[guess.key][1])
            when, remark = kind or "", "in some layers only" if kind is None else remark
        found.append(replace(guess, layout=layout, when=when, remark=remark))
    return found


def _axes_by_slot() -> dict[str, set[frozenset[str]]]:
    found: dict[str, set[frozenset[str]]] = {}
    for table in keymaps().values():
        for row in table.rows:
            for term, slot in enumerate(row.slots):
                found.setdefault(slot, set()).add(row.canonical_axes(term))
    return found


def _guesses(entries: Mapping[str, TensorEntry], said: Explanations) -> Iterator[_Guess]:
    patterns = _patterns(entries)
    endings = _endings(patterns)
    taken: Counter[str] = Counter()
    for key, shape in patterns.items():
        parts = key.split(".")
        found = ("", "", "")
        # One component, `weight`, says nothing.
        for count in range(min(5, len(parts)), 1, -1):
            fitting = [
                (times, slots, layout)
                for (slots, layout, is_layer), times in endings.get(
                    tuple(parts[-count:]), {}
                ).items()
                if is_layer == ("{L}" in key) and said.can_say(layout)
                if said.fits(Layout(layout), shape)
            ]
            if not fitting:
                continue
            _, slots, layout = max(fitting)
            others = sorted({other for _, _, other in fitting} - {layout})
            remark = f"or {' or '.join(others)}" if others else ""
            found = (slots, layout, remark or ("a guess" if count < 3 else ""))
            break
        if found[0] and taken[found[0]]:
            found = ("", "", "")
        taken[found[0]] += bool(found[0])
        said.declare(found[1])
        yield _Guess(key, found[0], found[1], shape, found[2])


def _endings(
    patterns: Mapping[str, tuple[int, ...]],
) -> dict[tuple[str, ...], dict[tuple[str, str, bool], tuple[int, int]]]:
    """What our tables say about the last components of keys, with the most of the checkpoint's keys
    that a table which says so spells the same way, and how many tables say so: slots, layout, and
    whether the key is of a layer."""
    found: dict[tuple[str, ...], dict[tuple[str, str, bool], tuple[int, int]]] = {}
    for table in keymaps().values():
        weight = sum(row.pattern.text in patterns for row in table.rows)
        for row in table.rows:
            parts = row.pattern.text.split(".")
            said = (" | ".join(row.slots), row.layout.text, "L" in row.pattern.names)
            for count in range(2, min(5, len(parts)) + 1):
                tally = found.setdefault(tuple(parts[-count:]), {})
                most, times = tally.get(said, (0, 0))
                tally[said] = (max(most, weight), times + 1)
    return found


def _patterns(entries: Mapping[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    """Keys with their numbers named, and the shape of the first of each."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, entry in entries.items():
        shapes.setdefault(_pattern(key)[0], entry.shape)
    return shapes


def _pattern(key: str) -> tuple[str, dict[str, int]]:
    """A key with its numbers named, and the numbers."""
    template, numbers = split_key(key)
    parts = template.split(".")
    at = 0
    used: dict[str, int] = {}
    for position, part in enumerate(parts):
        if part != "{}":
            continue
        before = parts[position - 1] if position else ""
        index = _INDEX_AFTER.get(before, "L" if at == 0 else "")
        if index in used:
            index = ""
        if index:
            used[index] = numbers[at]
        parts[position] = f"{{{index}}}" if index else str(numbers[at])
        at += 1
    return ".".join(parts), used
