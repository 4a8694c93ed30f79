"""Runs that train only some parameters: which ones, by what their moments' shapes leave possible.

An optimizer numbers the parameters it was given, so frozen ones have no number and no state.  The
numbers are then of some of the model's parameters, in their order: a subsequence.  Only one that is
the same from the left as from the right is certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.numbering import some_of
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

    found = [
        some_of(list(ids), list(names), fits) for ids, names in zip(groups, order, strict=True)
    ]
    if not all(found):
        return []
    return [[choices[0] for choices in found], [choices[1] for choices in found]]


def _shapes(moments: object) -> dict[object, tuple[int, ...]]:
    if not isinstance(moments, Mapping):
        return {}
    return {
        kind: entry.shape
        for kind, entry in moments.items()
        if isinstance(entry, TensorEntry) and entry.shape != ()
    }
