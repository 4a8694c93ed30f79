"""Parts that some models have and others do without, and the bounds of their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from dcpconv.core.record import Json, Record, field

Size = Annotated[int, field(ge=1, le=2**31 - 1)]
"""Length of an axis, in elements."""

Count = Annotated[int, field(ge=1, le=100_000)]
"""Layers, heads or experts.  The bound keeps a hostile file from asking for billions of keys."""

Positive = Annotated[float, field(gt=0)]


SPECIAL = frozenset(
    {
        *("chunked_attention", "indexer", "qk_norm_late", "qk_norm_plain"),
        *("scaled_inputs", "short_convolution", "sparse_mixer", "state_space", "temperature"),
        *("borrowed_keys", "keys_as_values", "layer_scalars", "mixed_experts", "per_layer_inputs"),
        *("sizes_by_layer", "value_norm", "value_scale", "softplus_gate", "router_softcap"),
        *("averaged_experts", "sigmoid_scores", "double_layers", "idle_experts", "latent_scales"),
    }
)
"""Names of features that a few classes of transformers alone have."""


class RopeScaling(Record):
    """How rotary frequencies are stretched beyond the length a model was first trained for.

    Attributes:
        kind: ``rope_type`` in transformers: ``linear``, ``dynamic``, ``yarn``, ``longrope``,
            ``llama3``, ...
        parameters: The other fields, as the source spells them.
    """

    kind: str
    parameters: Mapping[str, Json] = field(default_factory=dict)

    def __str__(self) -> str:
        factor = self.parameters.get("factor")
        return self.kind if factor is None else f"{self.kind}, factor {factor}"


class Experts(Record):
    """A mixture of experts in place of one feed-forward block.

    Attributes:
        count: Routed experts.
        per_token: Routed experts that see each token.
        ffn_size: Width of one routed expert.
        shared_count: Experts that see every token.
        shared_ffn_size: Width of one shared expert; present exactly when there are any.
        shared_gate: Whether every token weighs what the shared experts add to it.
        norm_topk: Whether the weights of the chosen experts are scaled to sum to one.
        dense_layers: Layers that have a plain feed-forward block, in order.
        scoring: What turns router logits into weights: ``softmax`` over all experts or ``sigmoid``.
        selection_bias: Whether a stored bias takes part in choosing experts, not in weighing them.
        routed_scale: Factor on what the routed experts add.
        groups: Groups of experts that compete first; 1 for none.
        top_groups: Groups that stay in the race.
        bias: Whether the router and the projections of routed experts have biases (gpt-oss).
    """

    count: Count
    per_token: Count
    ffn_size: Size
    shared_count: Annotated[int, field(ge=0, le=100_000)] = 0
    shared_ffn_size: Size | None = None
    shared_gate: bool = False
    norm_topk: bool = False
    dense_layers: tuple[Annotated[int, field(ge=0)], ...] = ()
    scoring: str = "softmax"
    selection_bias: bool = False
    routed_scale: Positive = 1.0
    groups: Count = 1
    top_groups: Count = 1
    bias: bool = False

    def agree(self) -> None:
        if (self.shared_count > 0) != (self.shared_ffn_size is not None):
            raise ValueError("shared_count and shared_ffn_size must both be set or both be absent")
        if self.per_token > self.count:
            raise ValueError(f"per_token {self.per_token} exceeds the {self.count} experts")

    def __str__(self) -> str:
        shared = f", {self.shared_count} shared" if self.shared_count else ""
        return f"{self.count} experts, {self.per_token} per token{shared}"


class LatentAttention(Record):
    """Attention whose keys and values pass through a narrow projection (DeepSeek's MLA).

    ``ModelSpec.head_dim`` is then the part of a head that RoPE turns.

    Attributes:
        q_rank: Width of the query's projection, or ``None`` where queries are projected directly.
        kv_rank: Width of the projection that keys and values share.
        nope_dim: Channels of a query or key head that RoPE leaves alone.
        value_dim: Channels of a value head.
        bias: Whether the projections into the ranks have biases; those out of them have none.
    """

    q_rank: Size | None
    kv_rank: Size
    nope_dim: Size
    value_dim: Size
    bias: bool = False

    def __str__(self) -> str:
        return f"rank {self.kv_rank}"
