"""What is the same in two checkpoints, and what is not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from dcpconv.plan.canonical import LAYOUTS
from dcpconv.plan.differences import SAME, Status, TensorDiff, plain
from dcpconv.sources.opening import End

SCHEMA = 1
"""Version of ``Diff.to_json``; it grows when a field changes its meaning or goes away."""

By = Literal["layer", "slot"]


@dataclass(frozen=True, slots=True)
class Diff:
    """Two checkpoints, tensor by tensor; true if they are the same within the tolerance.

    Attributes:
        a: The first, as the user named it.
        b: The second.
        families: Namings of both; empty where keys are compared.
        tensors: Everything, what changed most first: by status, then by relative difference.
        tolerance: Largest |a-b| that counts as the same.
        notes: What else a user should know, one sentence each.
    """

    a: End
    b: End
    families: tuple[str, str]
    tensors: tuple[TensorDiff, ...]
    tolerance: float = 0.0
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return all(tensor.status in SAME for tensor in self.tensors)

    @property
    def is_told(self) -> bool:
        """Whether there is an answer: something differs, or everything could be compared."""
        return any(tensor.status not in {*SAME, "untold"} for tensor in self.tensors) or bool(self)

    def of(self, status: Status) -> tuple[TensorDiff, ...]:
        """The tensors of one status, what changed most first."""
        return tuple(tensor for tensor in self.tensors if tensor.status == status)

    def groups(self, by: By) -> tuple[Group, ...]:
        """Tensors put together by layer or slot, in the order of the model."""
        found: dict[str | int | None, list[TensorDiff]] = {}
        for tensor in self.tensors:
            at = tensor.layer if by == "layer" else tensor.slot or tensor.name
            found.setdefault(at, []).append(tensor)
        groups = [Group.of(at, tensors) for at, tensors in found.items()]
        return tuple(sorted(groups, key=lambda group: _order(group.name)))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values; ``docs/comparing.md`` describes the fields."""
        return {
            "schema": SCHEMA,
            "same": bool(self),
            "told": self.is_told,
            "a": {"path": self.a.path, "form": self.a.form, "family": self.families[0] or None},
            "b": {"path": self.b.path, "form": self.b.form, "family": self.families[1] or None},
            "tolerance": self.tolerance,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one layer or slot.

    Attributes:
        name: The layer's number, the slot; ``None`` for what is beside the layers.
        tensors: How many there are.
        changed: How many of them are not the same.
        max_abs: Largest |a-b|; 0.0 where all are equal.
        relative: Norm of a-b by the norm of a, over what was measured; 0.0 where all are equal.
        worst: The tensor that changed most.
    """

    name: str | int | None
    tensors: int
    changed: int
    max_abs: float
    relative: float
    worst: TensorDiff = field(repr=False)

    @classmethod
    def of(cls, name: str | int | None, tensors: list[TensorDiff]) -> Group:
        """Some tensors, what changed most first."""
        measured = [tensor.apart for tensor in tensors if tensor.apart is not None]
        base = math.fsum(apart.squares[0] for apart in measured)
        moved = math.fsum(apart.squares[2] for apart in measured)
        return cls(
            name,
            len(tensors),
            sum(tensor.status not in SAME for tensor in tensors),
            max((apart.max_abs for apart in measured), default=0.0),
            math.sqrt(moved / base) if base else (math.inf if moved else 0.0),
            tensors[0],
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            "changed": self.changed,
            "max_abs": plain(self.max_abs),
            "relative": plain(self.relative),
            "worst": self.worst.name,
        }


_PLACE = {slot: number for number, slot in enumerate(LAYOUTS)}


def _order(name: str | int | None) -> tuple[bool, int, str]:
    """What is beside the layers first, layers by number, slots as the list of them has them."""
    if isinstance(name, int):
        return True, name, ""
    return name is not None, _PLACE.get(name or "", len(_PLACE)), name or ""
