"""What carrying a training run did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dcpconv.plan.training.state import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryReport:
    """What was carried from one trainer's checkpoint to another's.

    Attributes:
        source: Path of the source.
        source_kind: Whose checkpoint it is.
        source_family: Naming of its weights.
        target: Path of the result.
        target_kind: Whose checkpoint it is.
        target_family: Naming of its weights.
        weights: Tensors of the model in the result.
        parameters: Of those, how many the optimizer has state for.
        moments: Names of the optimizer's state: ``step``, ``exp_avg``, ``exp_avg_sq``.
        relabelled: Parameters whose elements, and whose moments' elements, changed places.
        groups: Parameters in every group of the result.
        beside: Names of what travels beside the tensors.
        left: ``(name, why)`` of what the target cannot hold.
        notes: What else a user should know.
        nbytes: Of all tensors in the result.
        is_dry_run: Whether nothing was written.
    """

    source: str
    source_kind: Kind
    source_family: str
    target: str
    target_kind: Kind
    target_family: str
    weights: int
    parameters: int
    moments: tuple[str, ...]
    relabelled: int
    groups: tuple[int, ...]
    beside: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    nbytes: int
    is_dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {**asdict(self), "left": [{"name": name, "why": why} for name, why in self.left]}
