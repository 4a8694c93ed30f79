"""Which parameter an integer in an optimizer's state means.

torch numbers parameters as the trainer handed them over: MiniMind passes ``model.parameters()``,
Hugging Face Trainer passes those that decay first.  Frozen parameters have no number.
``parameters()`` follows the order in which modules were registered, which no file tells;
``families`` does, as a rank per component of a key.

Source: jingyaogong/minimind@d65ef2c ``trainer/``, ``model/``; transformers 5.23 ``trainer.py``
(``create_optimizer``, ``get_decay_parameter_names``) and ``models/*/modeling_*.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from dcpconv.core.catalog import TensorEntry
from dcpconv.families.family import parameter_orders
from dcpconv.families.keymaps import Keymap
from dcpconv.plan.training.frozen import readings_of, unlike
from dcpconv.plan.training.state import Group, Moments, OptimizerError
from dcpconv.sources.fitting import bare
from dcpconv.sources.parameter_shapes import ranked, words
from dcpconv.sources.recognition import Weights

_UNDECAYED: Final = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Of a lower-case key.  Source: transformers 5.23 ``Trainer.get_decay_parameter_names``."""


def parameters_in_order(keymap: Keymap, keys: Iterable[str]) -> list[str]:
    """``keys`` in the order of the model's ``parameters()``.

    Raises:
        OptimizerError: The order is not known for this naming, or not for some keys.
    """
    order = parameter_orders().get(keymap.name)
    if order is None:
        raise OptimizerError(
            f"the order of the parameters of {keymap.name} is not known",
            [("known", name) for name in parameter_orders()],
            hint="a DCP names parameters instead of counting them: --to dcp",
        )
    keys = list(keys)
    found = ranked(order, keys)
    if found is None:
        known = set(order.split())
        raise OptimizerError(
            f"the order of the parameters of {keymap.name} is not known for some keys",
            [("key", key) for key in keys if not known.issuperset(words(key))],
        )
    return found


def trainable(weights: Weights) -> list[str]:
    """Keys in the order of the file, without buffers and without the second names of tied tensors
    that share a storage."""
    return [
        key
        for key in weights.entries
        if not _is_buffer(weights.keymap, key) and key not in weights.tied
    ]


def without_second_names(weights: Weights, keys: Sequence[str]) -> list[str]:
    """Keys without those that a tie of the naming makes a second name of another one there."""
    ties = weights.keymap.ties if weights.keymap else ()
    second = {tie.key for tie in ties if tie.owner in weights.entries}
    return [key for key in keys if key not in second]


def _is_buffer(keymap: Keymap | None, key: str) -> bool:
    match = keymap.match(key) if keymap else None
    return match is not None and match.row is None and match.kind != "aside"


def by_decay(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parameters as Hugging Face Trainer groups them: with and without weight decay."""
    undecayed = [key for key in keys if _UNDECAYED.search(key.lower())]
    return [key for key in keys if key not in set(undecayed)], undecayed


def trainer_orders(weights: Weights) -> list[list[list[str]]]:
    """How Trainer may have grouped the parameters, by release: norms decayed in some."""
    stored = _in_order(weights)
    orders: list[list[list[str]]] = []
    for keys in (stored, without_second_names(weights, stored)):
        biases = [key for key in keys if "bias" in key]
        orders += [
            [*by_decay(keys)],
            [[key for key in keys if key not in set(biases)], biases],
            [keys],
        ]
    return orders


def _in_order(weights: Weights) -> list[str]:
    """By the naming; where it does not tell, as a ``torch.save`` file lists them, which is the
    order of the modules, too."""
    keys = trainable(weights)
    order = parameter_orders().get(weights.keymap.name) if weights.keymap else None
    known = ranked(order, keys) if order is not None else None
    if known is not None:
        return known
    if weights.catalog.form == "torch" and len(weights.catalog.files) == 1:
        return keys
    return parameters_in_order(weights.require_keymap(), keys)


def minimind_orders(weights: Weights) -> list[list[list[str]]]:
    """How MiniMind numbers the parameters: as the file lists them, a tied head left out."""
    keys = trainable(weights)
    tied = without_second_names(weights, keys)
    return [[tied]] if tied == keys else [[tied], [keys]]


def by_fqn(
    state: Mapping[object, object],
    param_groups: Sequence[Mapping[str, object]],
    orders: Sequence[Sequence[Sequence[str]]],
    weights: Weights,
) -> tuple[Moments, tuple[Group, ...]]:
    """Names the parameters of an optimizer state that counts them.

    Args:
        state: Id -> name -> tensor.
        param_groups: Each with ``params``: ids, or FQNs already.
        orders: Candidates: the parameters of every group, in order.
        weights: The parameters, for their shapes.

    Raises:
        OptimizerError: No candidate fits the shapes of the moments, or several do and differ; or
            some parameters were frozen, and the shapes leave a choice which.
    """
    groups = [list(_list(group.get("params"))) for group in param_groups]
    named = _names(param_groups, groups)
    if named is None:
        readings = readings_of(groups, orders, state, weights)
        if len(readings) != 1:
            raise _mismatch(groups, orders, readings, state, weights)
        named = readings[0]
    moments: dict[str, Mapping[str, TensorEntry | float]] = {}
    refused: list[tuple[str, object]] = []
    for ids, names in zip(groups, named, strict=True):
        for number, name in zip(ids, names, strict=True):
            found = state.get(number)
            if isinstance(found, Mapping):
                kinds = _torch_names(name, found)
                moments[name] = {
                    kind: entry if isinstance(entry, TensorEntry) else float(entry)
                    for kind, entry in kinds.items()
                    if isinstance(entry, TensorEntry)
                    or (kind == "step" and isinstance(entry, (int, float)))
                }
                refused += [
                    ("value", f"{kind} of {name} is a {type(value).__name__}")
                    for kind, value in kinds.items()
                    if kind not in moments[name] and value is not None
                ]
    if refused:
        raise OptimizerError("optimizer state holds what is no tensor", refused)
    return moments, tuple(
        Group(_values(group), tuple(names))
        for group, names in zip(param_groups, named, strict=True)
    )


def _torch_names(name: str, found: Mapping[object, object]) -> dict[str, object]:
    """State under the names that torch gives it; bitsandbytes numbers the moments of 32-bit Adam.

    Raises:
        OptimizerError: The moments are quantized.

    Source: bitsandbytes 0.45 ``optim/optimizer.py`` (``Optimizer2State``).
    """
    kinds = {str(kind): value for kind, value in found.items()}
    if any(kind.startswith(("absmax", "qmap")) for kind in kinds):
        raise OptimizerError(
            "the moments are quantized to 8 bits, which no other optimizer reads",
            [("parameter", name), ("found", ", ".join(kinds))],
            hint="weights alone are for `dcpconv convert`",
        )
    if {"state1", "state2"} <= kinds.keys():
        torch_names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
        return {torch_names.get(kind, kind): value for kind, value in kinds.items()}
    return kinds


def _values(group: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in group.items() if key not in {"params", "param_names"}}


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _names(
    param_groups: Sequence[Mapping[str, object]],
    groups: Sequence[Sequence[object]],
) -> list[list[str]] | None:
    """FQNs where the optimizer was given names, or was saved by FQN."""
    if all(isinstance(param, str) for group in groups for param in group) and any(groups):
        return [[bare(str(param)) for param in group] for group in groups]
    if all("param_names" in group for group in param_groups) and param_groups:
        return [[bare(str(name)) for name in _list(group["param_names"])] for group in param_groups]
    return None


def _mismatch(
    groups: Sequence[Sequence[object]],
    orders: Sequence[Sequence[Sequence[str]]],
    fitting: Sequence[Sequence[Sequence[str]]],
    state: Mapping[object, object],
    weights: Weights,
) -> OptimizerError:
    source = ("source", weights.catalog.source)
    if fitting:
        differ = [
            f"{number} is {one} or {other}"
            for ids, ones, others in zip(groups, fitting[0], fitting[1], strict=True)
            for number, one, other in zip(ids, ones, others, strict=True)
            if one != other
        ]
        return OptimizerError(
            "several parameters may be meant by a number in the optimizer state",
            [source, *(("ambiguous", line) for line in differ)],
            hint="torch stores the names of parameters that an optimizer is given with their names:"
            " AdamW(model.named_parameters())",
        )
    facts: list[tuple[str, object]] = [("expected", _counts(order)) for order in orders]
    same = [o for o in orders if [len(g) for g in o] == [len(g) for g in groups]]
    facts += [
        ("unlike", line) for order in same[:1] for line in unlike(groups, order, state, weights)
    ]
    return OptimizerError(
        "the optimizer state is not of these parameters",
        [source, *facts, ("found", _counts(groups))],
        hint="they fit no choice of its parameters; is this the optimizer of another model?",
    )


def _counts(groups: Sequence[Sequence[object]]) -> str:
    return " and ".join(str(len(group)) for group in groups) + " parameters"
