"""Tables of models that call their base model otherwise, or that are nothing but a base model."""

from __future__ import annotations

from dataclasses import replace

from dcpconv.families.keymaps.index import OTHER_BASES
from dcpconv.families.keymaps.table import HEADS, Kept, Keymap, Pattern, Tie


def variants(table: Keymap, root: str, *, has_head: bool) -> list[Keymap]:
    """The table with everything else that may stand before the keys of its base model.

    Under a root that is such a prefix itself, nothing is not among them: the same keys are those of
    the model that holds the base model, and a head or a stray key beside them is one of its own.

    Args:
        table: As it is written.
        root: What stands before the keys that it is for: ``model.``, or empty.
        has_head: Whether a model without a prefix has a head all the same.
    """
    prefixes = (table.base, *OTHER_BASES)
    is_inside = any(prefix and root.endswith(prefix) for prefix in prefixes)
    found = [
        under(table, prefix, has_head=has_head or bool(prefix))
        for prefix in OTHER_BASES
        if prefix or not is_inside
    ]
    return [one for one in found if one is not table]


def under(table: Keymap, prefix: str, *, has_head: bool = True) -> Keymap:
    """The table with ``prefix`` in place of its ``base``: the same one whenever it is asked for.

    Args:
        table: As it is written.
        prefix: What stands before the keys of the base model.
        has_head: Whether anything stands behind its last layer.
    """
    base = table.base
    if prefix == base or not base:
        return table
    if (prefix, has_head) not in table.variants:
        table.variants[prefix, has_head] = _moved(table, base, prefix, has_head=has_head)
    return table.variants[prefix, has_head]


def _moved(table: Keymap, base: str, prefix: str, *, has_head: bool) -> Keymap:
    """A table with another prefix, with or without its heads."""

    def key(text: str) -> str:
        return prefix + text[len(base) :] if text.startswith(base) else text

    def reasons(said: tuple[tuple[Pattern, str], ...]) -> tuple[tuple[Pattern, str], ...]:
        return tuple((Pattern(key(pattern.text)), reason) for pattern, reason in said)

    rows = [row for row in table.rows if has_head or not HEADS & set(row.slots)]
    held = {row.pattern.text for row in rows}
    return replace(
        table,
        rows=tuple(replace(row, pattern=Pattern(key(row.pattern.text))) for row in rows),
        ties=tuple(
            Tie(key(tie.key), key(tie.owner), tie.omitted)
            for tie in table.ties
            if tie.owner in held and (has_head or tie.key.startswith(base))
        ),
        ignored=reasons(table.ignored),
        aside=reasons(table.aside),
        derived={key(text): rule for text, rule in table.derived.items()},
        kept=tuple(Kept(key(part.prefix), part.role) for part in table.kept),
        is_headless=not has_head,
    )
