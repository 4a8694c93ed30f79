"""Tensors that may stay behind: those that do nothing, and those that the user gives up.

A router's selection bias takes part in choosing experts and in nothing else.  Zeros choose nothing;
any other values change the model, so they stay behind only if the user says so, as the tensors of
every feature do that the target cannot express.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.families.keymaps import Keymap, Row
from dcpconv.plan.coverage import as_stored
from dcpconv.plan.fills import fill_of
from dcpconv.sources.recognition import Weights
from dcpconv.sources.said import SELECTION_BIAS
from dcpconv.stores.local import Sources

_HEADS: Mapping[str, str] = {"score_bias": "score", "score": "none", "spans": "none"}
"""``ModelSpec.head`` of what is left of a model without its head, or the bias of that."""

_ZEROS = "all zeros, so that it does nothing"
_ALLOWED = f"takes part in choosing experts; left out because {SELECTION_BIAS} was allowed to be"

_TENSORS: Mapping[str, frozenset[str]] = {
    "qkv_bias": frozenset({"layer.q_bias", "layer.k_bias", "layer.v_bias"}),
    "o_bias": frozenset({"layer.o_bias", "layer.latent.o_bias"}),
    "mlp_bias": frozenset(
        f"layer.{block}{name}_bias" for block in ("", "shared.") for name in ("gate", "up", "down")
    ),
    "head_bias": frozenset({"head_bias"}),
    "attention_gate": frozenset({"layer.o_gate"}),
    "indexer": frozenset(
        f"layer.indexer.{name}" for name in ("q", "k", "k_norm", "k_norm_bias", "weights")
    ),
    "qk_norm": frozenset({"layer.q_norm", "layer.k_norm"}),
    "qk_norm_whole": frozenset({"layer.q_norm_whole", "layer.k_norm_whole"}),
    "post_norms": frozenset({"layer.post_attn_norm", "layer.post_ffn_norm"}),
    "score_bias": frozenset({"score_bias"}),
    "score": frozenset({"score"}),
    "spans": frozenset({"spans", "spans_bias"}),
}
"""Slots of the features that are tensors of their own; without them the rest is still a model."""


def without_idle(
    weights: Weights,
    spec: ModelSpec | None,
    target: Keymap | None,
    *,
    allow: Sequence[str] = (),
) -> tuple[Weights, ModelSpec | None]:
    """The weights with the tensors marked that stay behind, and the model as it is without them.

    For zeros only tensors are looked at that the source's table derives as such, which are small:
    this is how experts without a selection bias find back out of a family that always stores one.

    Args:
        weights: The source; where its bytes are not at hand, nothing is taken for zero.
        spec: The model's numbers.
        target: The naming to reach.
        allow: Features that may be left out although the target cannot express them; with
            ``selection_bias``, values other than zero too.
    """
    weights, spec = _given_up(weights, spec, target, allow)
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
    return replace(weights, idle={**weights.idle, **dict.fromkeys(keys, reason)}), spec


def _given_up(
    weights: Weights, spec: ModelSpec | None, target: Keymap | None, allow: Sequence[str]
) -> tuple[Weights, ModelSpec | None]:
    """Marks the tensors of features that are refused and allowed to be left out.

    A feature that the target has tensors for, yet no way to switch on, is taken from the spec, so
    that none are written.
    """
    source = weights.keymap
    if spec is None or source is None or target is None or target is source:
        return weights, spec
    allowed = [feature for feature in _TENSORS if feature in allow]
    if not allowed:
        return weights, spec
    refused = {item.name for item in configs.refusals(target.parameter_family, spec)}
    idle: dict[str, str] = {}
    for feature in allowed:
        if feature not in refused:
            continue
        slots = _TENSORS[feature]
        rows = [row for row in source.rows if set(row.slots) <= slots]
        reason = f"left out because {feature} was allowed to be"
        idle |= dict.fromkeys(_keys_of(weights, rows), reason)
        if feature in _HEADS:
            n_classes = spec.n_classes if feature == "score_bias" else None
            spec = spec.model_copy(update={"head": _HEADS[feature], "n_classes": n_classes})
        elif slots & target.slots:
            spec = spec.model_copy(update={feature: False})
    return replace(weights, idle={**weights.idle, **idle}), spec


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
    return _keys_of(weights, rows)


def _keys_of(weights: Weights, rows: Sequence[Row]) -> list[str]:
    """Keys that are of one of these rows; without a row, no key need be looked at."""
    source = weights.keymap
    if source is None or not rows:
        return []
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
    from dcpconv.engine.execute import fill  # noqa: PLC0415 - few models store such biases

    with Sources.of(weights.catalog) as sources:
        for entry in entries:
            box = fill_of(as_stored(entry.key, entry), (0,) * len(entry.shape), entry.shape)
            buffer = memoryview(bytearray(box.nbytes))
            fill(box, source=sources, into=buffer)
            yield not any(buffer)
