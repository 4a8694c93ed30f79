"""Runs that train an adapter: which of its tensors a number in the optimizer's state means.

PEFT keeps an adapter sorted by name, and torch counts parameters in the order of the modules they
hang on.  That order is the base's, so every naming that the names of those modules fit is asked.

Source: peft 0.21.2 ``tuners/lora/layer.py`` (``LoraLayer.__init__``: the order of the parts),
``utils/save_and_load.py`` (names in the file).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from dcpconv.families.family import parameter_orders
from dcpconv.families.keymaps import Keymap, keymaps
from dcpconv.families.parameter_files import read_parameter_file
from dcpconv.plan.training.order import by_decay, trainable
from dcpconv.plan.training.state import Group, OptimizerError, TrainingState
from dcpconv.sources.adapters.spotting import is_adapter_key
from dcpconv.sources.parameter_shapes import ranked
from dcpconv.sources.recognition import Weights
from dcpconv.sources.said import Said

PREFIX: Final = "base_model.model."
"""What PEFT puts before the names of the base."""

_PARTS: Final = (
    "base_layer modules_to_save lora_A lora_B lora_embedding_A lora_embedding_B"
    " lora_magnitude_vector lora default A B"
)
_MODULE: Final = re.compile(r"\.(?:lora_\w+|lora)(?:\.|$).*")


def is_adapters(keys: Iterable[str]) -> bool:
    """Whether these are the tensors of a PEFT adapter without its base: all named by PEFT, some of
    LoRA."""
    keys = list(keys)
    is_named = all(key.startswith(PREFIX) and ".base_layer." not in key for key in keys)
    return is_named and any(map(is_adapter_key, keys))


def architecture_of(said: Said) -> str | None:
    """The base's architecture, where the user names a directory with its config."""
    found = read_parameter_file(said.assets) if said.assets is not None else None
    return found.architecture if found is not None else None


def adapter_orders(weights: Weights, architecture: str | None = None) -> list[list[list[str]]]:
    """How Trainer may have grouped and counted the tensors of an adapter.

    Args:
        weights: The adapter.
        architecture: The base's, where it is known.

    Raises:
        OptimizerError: No naming with a known order has such modules.
    """
    orders: list[list[list[str]]] = []
    for keys in in_order(weights, architecture):
        orders += [[*by_decay(keys)], [keys]]
    return orders


def in_order(weights: Weights, architecture: str | None = None) -> list[list[str]]:
    """The tensors of an adapter as ``parameters()`` lists them, by every naming that fits.

    Raises:
        OptimizerError: None does.
    """
    keys = trainable(weights)
    if weights.catalog.form == "torch":
        return [keys]
    found: list[list[str]] = []
    for table in _tables(keys, architecture):
        order = ranked(f"{parameter_orders()[table.name]} {_PARTS}", keys, strip=PREFIX)
        if order is not None and order not in found:
            found.append(order)
    if not found:
        modules = dict.fromkeys(_base_name(key) for key in keys)
        raise OptimizerError(
            "the order of these parameters is not known",
            [
                ("source", weights.catalog.source),
                *(("parameter", name) for name in list(modules)[:8]),
                *(("known", name) for name in parameter_orders()),
            ],
            hint="name the base, whose config tells its architecture: --assets BASE",
        )
    return found


def adapter_in_order(state: TrainingState) -> list[str]:
    """The tensors of a run's adapter as ``parameters()`` lists them.

    Where several namings fit, the run's own optimizer had them in the order of one.

    Raises:
        OptimizerError: The order is not known, or several namings fit and differ.
    """
    weights = state.weights
    found = in_order(weights, architecture_of(state.model.said))
    own = [order for order in found if _is_of(state.groups, order)]
    found = own or found
    if len(found) > 1:
        differ = [(a, b) for a, b in zip(found[0], found[1], strict=True) if a != b]
        raise OptimizerError(
            "several orders of these parameters are possible",
            [
                ("source", weights.catalog.source),
                *(("ambiguous", f"{one} or {other}") for one, other in differ),
            ],
            hint="name the base, whose config tells its architecture: --assets BASE",
        )
    return found[0]


def _is_of(groups: Iterable[Group], order: Sequence[str]) -> bool:
    place = {key: number for number, key in enumerate(order)}
    ranks = [[place.get(key, -1) for key in group.params] for group in groups]
    return all(found == sorted(found) for found in ranks)


def _tables(keys: Sequence[str], architecture: str | None) -> list[Keymap]:
    names = {_base_name(key) for key in keys}
    return [
        table
        for name, table in keymaps().items()
        if name in parameter_orders()
        and (architecture is None or architecture in table.architectures)
        and all(table.match(base) for base in names)
    ]


def _base_name(key: str) -> str:
    """The weight of the base that a tensor of an adapter belongs to."""
    bare = key.removeprefix(PREFIX)
    module, count = _MODULE.subn("", bare)
    return f"{module}.weight" if count else bare
