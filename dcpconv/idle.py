"""Tensors that may stay behind: a bias that families without it can do without.

A router's selection bias takes part in choosing experts and in nothing else.  Zeros choose nothing;
any other values change the model, so they stay behind only if the user says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dcpconv.copying import Sources
from dcpconv.coverage import as_stored
from dcpconv.engine import fill
from dcpconv.keymaps import Keymap
from dcpconv.plan import fill_of
from dcpconv.recognition import Weights
from dcpconv.spec import ModelSpec

SELECTION_BIAS = "selection_bias"
"""What ``--allow`` calls it."""

_ZEROS = "all zeros, so that it does nothing"
_ALLOWED = f"takes part in choosing experts; left out because {SELECTION_BIAS} was allowed to be"


def without_idle(
    weights: Weights,
    spec: ModelSpec | None,
    target: Keymap | None,
    *,
    allow: Sequence[str] = (),
) -> tuple[Weights, ModelSpec | None]:
    """The weights with the tensors marked that the target has no place for and can do without.

    Only tensors that the source's table derives as zeros are looked at, which are small: this is
    how experts without a selection bias find back out of a family that always stores one.

    Args:
        weights: The source; where its bytes are not at hand, nothing is taken for zero.
        spec: The model's numbers.
        target: The naming to reach.
        allow: With ``selection_bias``, values other than zero may be left out too.
    """
    keys = _candidates(weights, target)
    if not keys:
        return weights, spec
    if SELECTION_BIAS in allow:
        reason = _ALLOWED
    elif all(_are_zero(weights, keys)):
        reason = _ZEROS
    else:
        return weights, spec
    if spec is not None and spec.experts is not None:
        experts = spec.experts.model_copy(update={"selection_bias": False})
        spec = spec.model_copy(update={"experts": experts})
    return replace(weights, idle=dict.fromkeys(keys, reason)), spec


def _candidates(weights: Weights, target: Keymap | None) -> list[str]:
    source = weights.keymap
    if source is None or target is None or target is source:
        return []
    zeros = {key for key, rule in source.derived.items() if rule == "zeros"}
    rows = [
        row
        for row in source.rows
        if row.pattern.text in zeros and not set(row.slots) & target.slots
    ]
    return [
        key
        for key in weights.entries
        if (match := source.match(key)) is not None and match.row in rows
    ]


def _are_zero(weights: Weights, keys: list[str]) -> Iterator[bool]:
    entries = [weights.entries[key] for key in keys]
    files = {chunk.extent.file for entry in entries for chunk in entry.chunks}
    at_hand = all((weights.catalog.path / file).is_file() for file in files)
    if not at_hand or not all(entry.chunks for entry in entries):
        yield False
        return
    with Sources(weights.catalog.path) as sources:
        for entry in entries:
            box = fill_of(as_stored(entry.key, entry), (0,) * len(entry.shape), entry.shape)
            buffer = memoryview(bytearray(box.nbytes))
            fill(box, source=sources, into=buffer)
            yield not any(buffer)
