"""The tensors of a model's state dict as hooks make it, in the shape of places of the model.

``get_model_state_dict`` looks every key up as an attribute of the model, so hooks that rename keys
defeat it: the module's own ``state_dict`` and ``load_state_dict`` are asked then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from dcpconv.loading.model import Place

_COMPILED = "_orig_mod."
"""torch keeps the component of a compiled module inside a checkpoint wrapper."""


@dataclass(frozen=True)
class Entry(Place):
    """One tensor of a state dict, wherever the model keeps it; ``name`` is its key there.

    Attributes:
        held: The tensor, as the state dict has it.
    """

    held: Tensor = field(kw_only=True)

    @property
    def tensor(self) -> Tensor:
        """As the state dict had it."""
        return self.held

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.held.size())


def fqn_of(key: str) -> str:
    """A key of a state dict as the model spells it."""
    return key.replace(_COMPILED, "")


def state_of(model: nn.Module) -> dict[str, Any]:
    """A model's state dict, as its hooks make it."""
    try:
        state = dict(get_model_state_dict(model, options=StateDictOptions(strict=False)))
    except AttributeError:
        return dict(_bare(model).state_dict())
    # torch 2.6 leaves out what has no memory yet (``_get_model_state_dict``).
    is_left_out = any(one.is_meta for one in model.parameters()) and not any(
        isinstance(value, Tensor) and value.is_meta for value in state.values()
    )
    return dict(_bare(model).state_dict()) if is_left_out else state


def set_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a model its state dict, or the part of it that has memory."""
    kept = {
        key: value
        for key, value in state.items()
        if not (isinstance(value, Tensor) and value.is_meta)
    }
    try:
        set_model_state_dict(model, kept, options=StateDictOptions(strict=False))
    except AttributeError:
        _bare(model).load_state_dict(kept, strict=False)


def _bare(model: nn.Module) -> nn.Module:
    """The module inside wrappers that put components before every key."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # noqa: SLF001
            model = model.get_submodule("_orig_mod")
        else:
            return model


def entries(model: nn.Module, found: tuple[Place, ...]) -> tuple[Entry, ...]:
    """The tensors of a model's state dict, tied ones once.

    Args:
        model: The model.
        found: Its parameters and buffers, which know what is tied.
    """
    state = state_of(model)
    tied = {fqn: place.fqns for place in found for fqn in place.fqns}
    keys = {fqn_of(key): key for key in state}
    made: dict[str, Entry] = {}
    for fqn, key in keys.items():
        value = state[key]
        if not isinstance(value, Tensor):
            continue
        others = [name for name in tied.get(fqn, ()) if name in keys]
        owner = others[0] if others else fqn
        if owner not in made:
            names = (fqn, *(name for name in others if name != fqn))
            made[owner] = Entry(names, model, key, True, True, held=value)
    return tuple(made.values())
