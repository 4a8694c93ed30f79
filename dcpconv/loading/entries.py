"""The tensors of a model's state dict as hooks make it, in the shape of places of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

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


def entries(model: nn.Module, found: tuple[Place, ...]) -> tuple[Entry, ...]:
    """The tensors of a model's state dict, tied ones once.

    Args:
        model: The model.
        found: Its parameters and buffers, which know what is tied.
    """
    state: Mapping[str, Any] = get_model_state_dict(model)
    tied = {fqn: place.fqns for place in found for fqn in place.fqns}
    keys = {key.replace(_COMPILED, ""): key for key in state}
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
