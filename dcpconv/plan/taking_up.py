"""What was kept in a file of its own when a checkpoint was made goes back to its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.core.catalog import TensorEntry
from dcpconv.formats import safetensors
from dcpconv.plan.account import Aim


def take_up(aim: Aim) -> tuple[Aim, tuple[str, ...]]:
    """The aim with the tensors kept aside beside its source, where the target has a place for
    them; and what to say about it.

    Raises:
        FormatError: The file is damaged.
    """
    table, weights = aim.table, aim.weights
    if table is None or not (table.aside or table.kept) or not aim.renames:
        return aim, ()
    file = weights.catalog.path / table.aside_file
    is_part_of_it = file.name in weights.catalog.files
    if is_part_of_it or not file.is_file():
        return aim, ()
    kept = safetensors.read_catalog(file).tensors
    entries: Mapping[str, TensorEntry] = {
        key: entry
        for key, entry in kept.items()
        if key not in weights.entries and table.keeps_aside(key)
    }
    note = f"{len(entries)} tensors of {file.name} beside the source go back to their place"
    more = replace(weights, entries={**weights.entries, **entries})
    return replace(aim, weights=more), (note,) if entries else ()
