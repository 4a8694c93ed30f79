"""What an adapter says, in no file format's spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.catalog import Catalog, TensorEntry


@dataclass(frozen=True, slots=True)
class LowRank:
    """One low-rank update of one matrix: ``W + scale * B @ A``.

    Attributes:
        module: Module of the base model, as the adapter spells it.
        parameter: Name of the parameter in it; ``weight`` of nearly all.
        a: Ranks by inputs.
        b: Outputs by ranks.
        scale: Factor on the product.
        is_embedding: The module is an embedding, whose matrix is tokens by channels.
        fan_in_fan_out: The matrix is stored as inputs by outputs.
        magnitude: DoRA's length of every output, or ``None``.
        bias: What is added to the module's bias, times ``scale``, or ``None``.
        rank: Ranks of one expert, where the parameter stacks several.
    """

    module: str
    parameter: str
    a: TensorEntry
    b: TensorEntry
    scale: float
    is_embedding: bool = False
    fan_in_fan_out: bool = False
    magnitude: TensorEntry | None = None
    bias: TensorEntry | None = None
    rank: int = 1

    @property
    def key(self) -> str:
        """Key of the matrix, as the adapter spells the base."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that can be merged.

    Attributes:
        path: What the user named.
        kind: ``PEFT LoRA``, or ``MiniMind LoRA``.
        catalog: Its tensors.
        updates: Low-rank updates.
        given: Tensors that replace the base's, by key as the adapter spells the base.
        base: The base model that it names, or empty.
        notes: What a user should know.
        keeps_ties: Whether tied tensors of the base stay one where the adapter gives one of them.
    """

    path: Path
    kind: str
    catalog: Catalog
    updates: tuple[LowRank, ...]
    given: Mapping[str, TensorEntry]
    base: str = ""
    notes: tuple[str, ...] = ()
    keeps_ties: bool = False
