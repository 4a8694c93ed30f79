"""What a table does not say of a model in its own naming, and is kept as it is stored.

A head that the table does not have, scales of a quantisation, tensors of a later release: they do
not make a known model unusable as long as nothing is renamed.
"""

from __future__ import annotations

from dataclasses import replace

from dcpconv.families.parameter_files import ParameterFile
from dcpconv.plan.coverage import Coverage, Fault, Target, as_stored
from dcpconv.sources.recognition import Weights

_HEAD = frozenset({"head", "head_bias"})
"""Slots that a model without a language-modelling head lacks."""

_AHEAD = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Fields that count layers after the last, which predict further tokens.

Source: config.json of DeepSeek-V3, Qwen3-Next and MiMo.
"""


def covered_by_own(
    coverage: Coverage,
    weights: Weights,
    parameters: ParameterFile | None,
    *,
    is_packed: bool,
) -> Coverage:
    """The account of a source in its own naming, with what its table does not know kept.

    Args:
        coverage: As the table has it, with something unknown, missing or misshapen.
        weights: The source.
        parameters: Its parameter file, which names the class.
        is_packed: Whether weights stay packed, in shapes that no table knows.
    """
    made = {target.key: target for target in coverage.targets}
    kept: dict[str, Target] = {}
    for fault in coverage.unknown:
        kept[fault.key] = as_stored(fault.key, weights.entries[fault.key])
    misshapen, faults = coverage.misshapen, (*coverage.unknown, *coverage.misshapen)
    if is_packed:
        for fault in misshapen:
            if fault.key in weights.entries:
                kept[fault.key] = as_stored(fault.key, weights.entries[fault.key])
        misshapen = tuple(fault for fault in misshapen if fault.key not in kept)
    missing = tuple(
        fault for fault in coverage.missing if not (is_packed or _is_left_off(fault, parameters))
    )
    order = {entry.key: place for place, entry in enumerate(weights.entries.values())}
    targets = sorted({**made, **kept}.values(), key=lambda target: order.get(_first(target), -1))
    return replace(
        coverage,
        targets=tuple(targets),
        unknown=(),
        misshapen=misshapen,
        missing=missing,
        kept=tuple(fault for fault in faults if fault.key in kept),
    )


def explains_more(parameters: ParameterFile | None) -> bool:
    """Whether a parameter file speaks of tensors that no table lists: packed weights, layers that
    predict ahead, or a class with a head that we do not know."""
    if parameters is None:
        return False
    is_ahead = any(parameters.fields.get(name) for name in _AHEAD)
    spec = parameters.spec
    is_known = spec is not None and spec.head != "lm"
    is_other = any(not name.endswith("ForCausalLM") for name in parameters.classes)
    return bool(parameters.quantized_by) or is_ahead or (is_other and not is_known)


def _first(target: Target) -> str:
    return target.pieces[0].entry.key if target.pieces else target.key


def _is_left_off(fault: Fault, parameters: ParameterFile | None) -> bool:
    """Whether a key is missing because the model is of a class without that head."""
    if not fault.slots or not set(fault.slots) <= _HEAD:
        return False
    classes = parameters.classes if parameters is not None else ()
    return bool(classes) and not any(name.endswith("ForCausalLM") for name in classes)
