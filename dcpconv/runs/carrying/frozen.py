"""Runs that train only some parameters: which ones, by what their moments' shapes leave possible.

An optimizer numbers the parameters it was given, so frozen ones have no number and no state.  The
numbers are then of some of the model's parameters, in their order: a subsequence.  Only one that is
the same from the left as from the right is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dcpconv.core.catalog import TensorEntry
from dcpconv.sources.recognition import Weights

Order = Sequence[Sequence[str]]
"""Parameters of every group, in order."""


def readings_of(
    groups: Sequence[Sequence[object]],
    orders: Sequence[Order],
    state: Mapping[object, object],
    weights: Weights,
) -> list[list[list[str]]]:
    """What the numbers of every group can mean: one reading is certain, two are only some of many.

    Orders that leave nothing out come first; only where none fits were parameters frozen.

    Args:
        groups: The numbers of every group.
        orders: Candidates for a model that trains all of its parameters.
        state: Number -> name -> tensor.
        weights: The parameters, for their shapes.
    """
    sizes = [len(group) for group in groups]
    whole = [
        [list(names) for names in order]
        for order in orders
        if [len(names) for names in order] == sizes and not unlike(groups, order, state, weights)
    ]
    found = whole or [
        reading
        for order in orders
        if len(order) == len(groups)
        for reading in _some_of(groups, order, state, weights)
    ]
    return [reading for n, reading in enumerate(found) if reading not in found[:n]]


def unlike(
    groups: Sequence[Sequence[object]],
    order: Order,
    state: Mapping[object, object],
    weights: Weights,
) -> list[str]:
    """Parameters whose moments have another shape."""
    found = []
    for ids, names in zip(groups, order, strict=True):
        for number, name in zip(ids, names, strict=True):
            expected = weights.entries[name].shape
            found += [
                f"{name}: {kind} {list(shape)}, the parameter {list(expected)}"
                for kind, shape in _shapes(state.get(number)).items()
                if shape != expected
            ]
    return found


def _some_of(
    groups: Sequence[Sequence[object]],
    order: Order,
    state: Mapping[object, object],
    weights: Weights,
) -> list[list[list[str]]]:
    def fits(number: object, name: str) -> bool:
        expected = weights.entries[name].shape
        return all(shape == expected for shape in _shapes(state.get(number)).values())

    pairs = [(list(ids), list(names)) for ids, names in zip(groups, order, strict=True)]
    left = [_leftmost(ids, names, fits) for ids, names in pairs]
    right = [_leftmost(ids[::-1], names[::-1], fits) for ids, names in pairs]
    if any(part is None for part in (*left, *right)):
        return []
    return [[part or [] for part in left], [(part or [])[::-1] for part in right]]


def _leftmost(
    ids: Sequence[object], names: Sequence[str], fits: Callable[[object, str], bool]
) -> list[str] | None:
    """The first names that fit the numbers one after the other, or ``None`` where they run out."""
    rest = iter(names)
    found = []
    for number in ids:
        name = next((name for name in rest if fits(number, name)), None)
        if name is None:
            return None
        found.append(name)
    return found


def _shapes(moments: object) -> dict[object, tuple[int, ...]]:
    if not isinstance(moments, Mapping):
        return {}
    return {
        kind: entry.shape
        for kind, entry in moments.items()
        if isinstance(entry, TensorEntry) and entry.shape != ()
    }
