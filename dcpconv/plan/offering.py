"""What adapters change about the tensors that a live model is offered."""

from __future__ import annotations

from dataclasses import replace

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.spec import ModelSpec
from dcpconv.plan.coverage import Coverage, Target
from dcpconv.plan.ties import differing
from dcpconv.sources.recognition import Weights


def trained_apart(
    weights: Weights, spec: ModelSpec | None
) -> tuple[ModelSpec | None, tuple[str, ...]]:
    """The numbers of a tied model whose head or embedding an adapter replaces by another tensor."""
    table, entries = weights.keymap, weights.entries
    if spec is None or not spec.tied or table is None:
        return spec, ()
    pairs = [
        (key, owner)
        for key, owner in table.tie_pairs().items()
        if key in entries and owner in entries
        if any(update.given for name in (key, owner) for update in entries[name].updates)
    ]
    if not differing(weights, pairs):
        return spec, ()
    note = f"the adapter has {pairs[0][0]} and {pairs[0][1]} apart: a model that ties them has one"
    return spec.model_copy(update={"tied": False}), (note,)


def widened(coverage: Coverage) -> Coverage:
    """The account where what adapters change is supplied as it is computed: whoever wants another
    type rounds once, from there."""

    def widen(target: Target) -> Target:
        entries = [piece.entry for piece in target.pieces]
        if not any(entry.updates for entry in entries):
            return target
        is_wide = any(entry.dtype.itemsize > 4 for entry in entries)
        return replace(target, dtype=BY_NAME["float64" if is_wide else "float32"])

    return replace(coverage, targets=tuple(map(widen, coverage.targets)))
