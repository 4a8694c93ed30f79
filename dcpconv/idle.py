"""Tensors that do nothing: a bias of zeros, which a family without it can do without."""

from __future__ import annotations

from dataclasses import replace

from dcpconv.copying import Sources
from dcpconv.coverage import Piece, Target
from dcpconv.engine import fill
from dcpconv.keymaps import Keymap
from dcpconv.plan import fill_of
from dcpconv.recognition import Weights
from dcpconv.spec import ModelSpec

_REASON = "all zeros, so that it does nothing"


def without_idle(
    weights: Weights, spec: ModelSpec | None, target: Keymap | None
) -> tuple[Weights, ModelSpec | None]:
    """The weights with tensors marked that the target has no place for and that are zero.

    Only tensors that the source's table derives as zeros are looked at, which are small: this is
    how experts without a selection bias find back out of a family that always stores one.
    """
    source = weights.keymap
    if source is None or target is None or target is source:
        return weights, spec
    zeros = {key for key, rule in source.derived.items() if rule == "zeros"}
    rows = [
        row
        for row in source.rows
        if row.pattern.text in zeros and not set(row.slots) & target.slots
    ]
    keys = [
        key
        for key in weights.entries
        if (match := source.match(key)) is not None and match.row in rows
    ]
    if not keys or not all(_is_zero(weights, keys)):
        return weights, spec
    if spec is not None and spec.experts is not None:
        experts = spec.experts.model_copy(update={"selection_bias": False})
        spec = spec.model_copy(update={"experts": experts})
    return replace(weights, idle=dict.fromkeys(keys, _REASON)), spec


def _is_zero(weights: Weights, keys: list[str]) -> list[bool]:
    found = []
    with Sources(weights.catalog.path) as sources:
        for key in keys:
            entry = weights.entries[key]
            target = Target(key, entry.shape, entry.dtype, (Piece(entry),))
            box = fill_of(target, (0,) * len(entry.shape), entry.shape)
            buffer = memoryview(bytearray(box.nbytes))
            fill(box, source=sources, into=buffer)
            found.append(not any(buffer))
    return found
