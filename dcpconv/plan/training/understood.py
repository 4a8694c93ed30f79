"""The model of a run: what understanding makes of its weights, and the ties its optimizer shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dcpconv.core.catalog import Catalog
from dcpconv.families.keymaps import Keymap
from dcpconv.plan.ties import differing
from dcpconv.plan.training.state import Group, part_of
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import Source, understand


def understood(
    catalog: Catalog,
    said: Said,
    *,
    root: str | None = None,
    tables: Iterable[Keymap] | None = None,
) -> Source:
    """The weights in a run's catalog.

    Args:
        catalog: What the run holds.
        said: What the user says of it.
        root: The container of the weights, where the kind of run decides it; empty for none.
        tables: The namings to choose among; by default all.
    """
    if root == "model":
        chosen = {k: e for k, e in catalog.tensors.items() if catalog.path_of(k)[0] == "model"}
        catalog = part_of(catalog, chosen)
    # What is under "model" may have wrappers of its own, such as DistributedDataParallel's.
    under = None if root == "model" else root
    return understand(catalog.source, said, catalog=catalog, root=under, tables=tables)


def with_ties(source: Source, groups: Iterable[Group]) -> Source:
    """The model with two equal tensors as one, where the optimizer knew only one of them."""
    weights, spec = source.weights, source.spec
    trained = {name for group in groups for name in group.params}
    pairs = [
        (tie.key, tie.owner)
        for tie in (weights.keymap.ties if weights.keymap else ())
        if tie.owner in trained and tie.key not in trained and tie.key in weights.entries
    ]
    unequal = differing(weights, [pair for pair in pairs if pair[0] not in weights.tied])
    ties = dict(pair for pair in pairs if pair not in unequal)
    if ties and spec is not None:
        spec = spec.model_copy(update={"tied": True})
    return replace(source, weights=replace(weights, tied={**ties, **weights.tied}), spec=spec)
