"""How well a table explains the keys of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dcpconv.core.catalog import Catalog
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap, Row

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that ``torch.compile``, FSDP1 and activation checkpointing put anywhere in a key."""


_STATED = 2
"""Hints of a table whose family's parameter file lies beside the tensors."""


RULED_OUT = -9
"""Hints of a table that contradicts the parameter file; a shape that is unusual for a family only
makes it less likely."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a table explains the keys under a root.

    Attributes:
        matched: Keys that it knows.
        unmatched: Keys that it does not.
        foreign: Keys outside the root.
        beside: Containers next to the weights where these have none of their own, as torchtitan
            saves them: ``optimizer``, ``train_state``.
        absent: Rows that it always has and no key is for.
        hinted: How far config and shapes speak for the family: above 0 for it, below against it.
    """

    root: str
    keymap: Keymap
    matched: int
    unmatched: int
    foreign: int
    absent: int
    hinted: int
    beside: frozenset[str] = frozenset()


def bare(key: str) -> str:
    """A key without the components that wrappers put into it.

    >>> bare("layers.0._orig_mod.attention.wq.weight")
    'layers.0.attention.wq.weight'
    """
    if "_orig_mod" not in key and "_wrapped_module" not in key:
        return key
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def misfit(fit: Fit) -> tuple[float, ...]:
    """The better a table fits, the less; in a tie the order of the candidates decides.

    The table that the parameter file is of comes first where it knows every key, and else after one
    that has every key and no other.
    """
    is_stated = fit.hinted >= _STATED
    if is_stated and not fit.unmatched:
        place = 0
    elif fit.unmatched == fit.absent == 0 and fit.hinted > RULED_OUT:
        place = 1
    else:
        place = 2 if is_stated and fit.unmatched <= fit.matched else 3
    return (
        place,
        fit.unmatched > 0,
        fit.unmatched / fit.matched,
        fit.absent,
        -fit.hinted,
        -fit.matched,
        fit.foreign,
    )


def fit_of(
    root: str,
    table: Keymap,
    counts: Mapping[tuple[str, ...], int],
    catalog: Catalog,
    spec: ModelSpec | None,
    containers: frozenset[str],
) -> Fit:
    """How well a table explains the keys under a root."""
    matched = unmatched = foreign = 0
    known = set()
    strange: Counter[str] = Counter()
    for key, count in under(root, counts):
        if key is None:
            foreign += count
        elif table.knows(key):
            matched += count
            known.add(key)
        else:
            unmatched += count
            strange[key.partition(".")[0]] += count
    beside = frozenset[str]()
    if root == "" and strange:
        inside = {key.partition(".")[0] for key in known}
        beside = containers & strange.keys() - inside
        apart = sum(strange[name] for name in beside)
        unmatched, foreign = unmatched - apart, foreign + apart
    needed = [row for row in table.rows if not row.when or set(row.slots) & set(table.always)]
    absent = sum(row.pattern.template not in known for row in needed)
    # Shapes are looked up only where every key is known: elsewhere they decide nothing.
    is_worth = matched and not (unmatched and spec is None)
    hinted = _hinted(root, table, catalog, spec) if is_worth else 0
    return Fit(root, table, matched, unmatched, foreign, absent, hinted, beside)


def containers_of(catalog: Catalog) -> frozenset[str]:
    """Outermost containers of what was saved."""
    return frozenset(str(path[0]) for path in catalog.paths.values() if len(path) > 1)


def _hinted(root: str, table: Keymap, catalog: Catalog, spec: ModelSpec | None) -> int:
    if spec is not None and spec.origin:
        said = _STATED if spec.origin == table.config else 0
        for name, value in table.hints.items():
            if hasattr(spec, name) and name != "vocab_size":
                said += 1 if getattr(spec, name) == value else RULED_OUT
        return said
    found = _shape_facts(root, table, catalog) if table.hints else {}
    if not table.hints.keys() & found.keys():
        return 0
    return 1 if all(found.get(name) == value for name, value in table.hints.items()) else -1


def _shape_facts(root: str, table: Keymap, catalog: Catalog) -> dict[str, int]:
    """What the shapes of a checkpoint say in the terms of ``Keymap.hints``."""
    rows = {}
    for slot in ("embed", "layer.q", "layer.k"):
        for row, _ in table.holders(slot):
            entry = catalog.tensors.get(root + row.pattern.key({"L": 0}))
            if entry is not None and entry.shape and row.layout.terms == 1:
                rows[slot] = entry.shape[0]
    facts = {"vocab_size": rows["embed"]} if "embed" in rows else {}
    if rows.get("layer.k"):
        facts["q_per_kv"] = rows.get("layer.q", 0) // rows["layer.k"]
    return facts


def clues(fit: Fit, spec: ModelSpec | None) -> list[str]:
    """What beside the keys speaks for the best table."""
    if spec is not None and spec.origin == fit.keymap.config:
        return [f"the parameter file beside it is of {fit.keymap.config}"]
    if fit.hinted <= 0 or not fit.keymap.hints:
        return []
    words = {"vocab_size": "{} tokens", "q_per_kv": "{} query heads per kv head"}
    found = [words[name].format(value) for name, value in fit.keymap.hints.items() if name in words]
    return [f"{' and '.join(found)}, as {fit.keymap.title} has"] if found else []


def under(root: str, counts: Mapping[tuple[str, ...], int]) -> Iterable[tuple[str | None, int]]:
    """Templates of the bare keys under a root, with their counts; ``None`` for keys outside it."""
    for template, count in counts.items():
        key = ".".join(template)
        yield (bare(key[len(root) :]) if key.startswith(root) else None), count


def rows_used(fit: Fit, counts: Mapping[tuple[str, ...], int]) -> list[object]:
    """What the table makes of every key, without its name."""

    def storage(row: Row | None) -> object:
        return row and (row.slots, row.layout.text)

    keys = (key for key, _ in under(fit.root, counts) if key is not None)
    return [[storage(row) for row in fit.keymap.rows_like(key)] for key in keys]
