"""The state of a live optimizer, by the names of the parameters that it belongs to.

Source: torch 2.13 ``optim/optimizer.py`` (``_process_value_according_to_param_policy``: floating
state has its parameter's dtype, ``step`` is fp32 and stays on the CPU unless the optimizer is fused
or capturable), ``optim/adam.py`` (``_init_group``), ``optim/sgd.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from dcpconv.loading.model import Place
from dcpconv.loading.regions import Need, Wish, needs_of
from dcpconv.plan.coverage import Target

STEP: Final = "step"


@dataclass(frozen=True)
class Room:
    """Memory for one kind of state of one parameter, made once all ranks have agreed.

    Attributes:
        group: The parameter's group.
        kind: ``exp_avg``.
        made: The memory, once there is some.
    """

    group: Mapping[str, Any]
    kind: str
    made: list[Tensor] = field(default_factory=list)

    def make(self, param: Tensor, state: dict[str, Any], *, is_flat: bool) -> None:
        """Allocates what the optimizer would; what it has already is kept.

        Args:
            param: The parameter, with memory.
            state: What the optimizer keeps of it.
            is_flat: Whether it is FSDP1's, which holds padding that no checkpoint has.
        """
        had = state.get(self.kind)
        if not isinstance(had, Tensor):
            if self.kind == STEP:
                is_beside = self.group.get("capturable") or self.group.get("fused")
                device = param.device if is_beside else "cpu"
                had = torch.zeros((), dtype=torch.float32, device=device)
            elif is_flat:
                had = torch.zeros_like(param)
            else:
                # Every element is read from the checkpoint: clearing it would touch it twice.
                had = torch.empty_like(param, memory_format=torch.preserve_format)
            state[self.kind] = had
        self.made[:] = [had.to_local() if isinstance(had, DTensor) else had.detach()]


@dataclass(frozen=True)
class StateNeed(Need):
    """A region of optimizer state; its memory is not the parameter's."""

    room: Room = field(kw_only=True)

    @property
    def into(self) -> Tensor:
        """Live memory; ask only once the room is made."""
        memory = self.room.made[0]
        if self.place.flat is not None and memory.dim():
            if memory.numel() == self.place.local.numel():
                return memory.view(-1)
            # The optimizer has FSDP1's flat parameter itself: this is one of many parts of it.
            start = self.place.local.storage_offset() - self.place.tensor.data.storage_offset()
            return memory[start : start + self.place.local.numel()]
        for dim, (at, length) in enumerate(zip(self.local, self.wish.sizes, strict=True)):
            memory = memory.narrow(dim, at, length)
        return memory


def params_by_fqn(optimizer: Optimizer, places: Sequence[Place]) -> dict[str, tuple[Place, Tensor]]:
    """Every parameter of an optimizer that the model has, by the name it is loaded under."""
    held = {id(param): param for group in optimizer.param_groups for param in group["params"]}
    found: dict[str, tuple[Place, Tensor]] = {}
    for place in places:
        own = getattr(place.module, place.name, None)
        param = next((t for t in (own, place.tensor) if id(t) in held), None)
        if param is not None and place.is_parameter:
            found[place.fqn] = (place, held[id(param)])
    return found


def state_needs(place: Place, key: str, target: Target, room: Room) -> Iterator[StateNeed]:
    """What this rank holds of one kind of state.

    Args:
        place: The parameter.
        key: What the state is called among all that is loaded.
        target: What the source has of it.
        room: Where it goes.
    """
    if target.shape == () and place.shape != ():
        yield StateNeed(Wish(key, (), (), 0, 1), place, (), room=room)
        return
    for need in needs_of(place, key):
        yield StateNeed(need.wish, place, need.local, room=room)


def kinds_of(optimizer: Optimizer, group: Mapping[str, Any]) -> frozenset[str] | None:
    """State that an optimizer of torch keeps of every parameter; ``None`` for another class."""
    if isinstance(optimizer, (Adam, AdamW)):
        more = {"max_exp_avg_sq"} if group.get("amsgrad") else set[str]()
        return frozenset({STEP, "exp_avg", "exp_avg_sq", *more})
    if isinstance(optimizer, SGD):
        return frozenset({"momentum_buffer"} if group.get("momentum") else ())
    return None
