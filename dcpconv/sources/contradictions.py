"""Whether a table that knows all keys of a checkpoint can be right about its layers and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.layout import Summed
from dcpconv.families.keymaps import Keymap, Row
from dcpconv.families.sizes import axis_names, solve
from dcpconv.sources.fitting import Fit, bare

Shape = tuple[int, ...]

_OUTSIDE = -1
"""Stands for the layer of what is in none."""


def possible(fits: Sequence[Fit], catalog: Catalog) -> list[Fit]:
    """The fits without those that layers or shapes contradict; all of them if that leaves none."""
    found = []
    for fit in fits:
        root = fit.root
        inside = ((k[len(root) :], t) for k, t in catalog.tensors.items() if k.startswith(root))
        if not contradicts(fit.keymap, inside):
            found.append(fit)
    return found or list(fits)


def contradicts(table: Keymap, entries: Iterable[tuple[str, TensorEntry]]) -> bool:
    """Whether a table that knows all keys cannot be right, since its layers are of another kind or
    its sizes of another length.

    A layer that has one row of a kind has all of them, and none of a kind that excludes it.  A norm
    over all heads is not one over the channels of each: no model has a single head.

    Args:
        table: It knows every key.
        entries: Keys under the root of the weights, and their tensors.
    """
    layers: dict[int, dict[Row, Shape]] = {}
    for key, entry in entries:
        match = table.match(bare(key))
        if match is not None and match.row is not None and match.kind == "row":
            layer = match.indices.get("L", _OUTSIDE)
            layers.setdefault(layer, {}).setdefault(match.row, entry.shape)
    outside = layers.pop(_OUTSIDE, {})
    known: dict[str, int] = {"two": 2}
    if not _agree(outside, known):
        return True
    excluded = _excluded(table)
    rows = [row for row in table.rows if "L" in row.pattern.names]
    for shapes in layers.values():
        words = frozenset[str]().union(*(row.conditions for row in shapes))
        if any(words >= pair for pair in excluded):
            return True
        if any(row.conditions <= words and row not in shapes for row in rows):
            return True
        if not _agree(shapes, dict(known)):
            return True
    return False


def _excluded(table: Keymap) -> list[frozenset[str]]:
    """Pairs of kinds that no layer is of at once."""
    pairs = [frozenset({"dense", "moe"})]
    for kind, rules in table.declared.kinds.items():
        pairs += [frozenset({kind, rule[4:]}) for rule in rules if rule.startswith("not ")]
    return pairs


def _agree(shapes: Mapping[Row, Shape], sizes: dict[str, int]) -> bool:
    """Whether shapes can be what layouts say, for some lengths of the axes that are still open."""
    before = -1
    while before != len(sizes):
        before = len(sizes)
        for row, shape in shapes.items():
            solve(row, shape, sizes)
    products: dict[tuple[str, ...], int] = {(): 1}  # of axes whose own lengths are still open
    for row, shape in shapes.items():
        if len(row.layout.nodes) != len(shape):
            return False
        for node, length in zip(row.layout.nodes, shape, strict=True):
            names = axis_names(node)
            if isinstance(node, Summed) or not names:
                continue
            known = prod(sizes.get(name, 1) for name in names)
            if known == 0:
                if length:
                    return False
                continue
            open_ = tuple(sorted(name for name in names if name not in sizes))
            if length % known or products.setdefault(open_, length // known) != length // known:
                return False
    return sizes.get("h") != 1
