"""The flat params.json of Meta's Llama releases, which Mistral's own files extend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dcpconv.core.record import Record, field
from dcpconv.core.spec import Count, ModelSpec, Positive, RopeScaling, Size
from dcpconv.families.configs.ffn import ffn_width, solve_ffn
from dcpconv.families.configs.fields import unaccounted
from dcpconv.families.configs.parameters import Refusal, Wishes, checked, unexpressed

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Meta's code fixes.  Source: ``apply_scaling`` in llama-models ``models/llama3/model.py``."""


LENGTH = "max_position_embeddings"
"""What Mistral's files call the length, and what we write: Meta's code takes ``max_seq_len`` from
whoever runs it and fails if the file has it too.  Source: ``Llama3.build`` and ``Llama4.build`` of
llama-models 0.3.0."""

_HARMLESS = ("max_batch_size", "model_parallel_size", "dcpconv")
"""How much Meta's code computes at once, and what an earlier conversion left out."""

_HARMLESS_IF: Mapping[str, tuple[object, ...]] = {
    "attn_bias": (False,),
    "causal": (True,),
    "model_type": ("transformer",),
    "tied_embeddings": (False,),
    "use_biases": (False,),
}
"""What Mistral's own files say of a plain model.  Its ``moe``, ``vision_encoder`` and ``yarn``,
and Meta's ``quantization_args``, ``lora_args`` and ``vision_chunk_size`` are of other models."""


class _Params(Record, extra="allow"):
    dim: Size
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count | None = None
    head_dim: Size | None = None
    hidden_dim: Size | None = None
    vocab_size: int = -1
    multiple_of: Size = 256
    ffn_dim_multiplier: Positive | None = None
    norm_eps: Positive = 1e-5
    rope_theta: Positive | None = None
    use_scaled_rope: bool = False
    rope_scaling_factor: Positive | None = None
    sliding_window: Size | None = None
    max_seq_len: Size | None = field(default=None, names=("max_seq_len", LENGTH))


def read(fields: Mapping[str, object], file: Path) -> ModelSpec:
    """The model that a Meta params.json describes.

    The file does not say how long a sequence may be nor, before Llama 3, how many tokens there are
    (``vocab_size`` is -1: the tokenizer knew), and it says *that* RoPE is scaled, not by how much.
    The first and the last are those of the release that the other fields point to.

    Raises:
        SpecError: Facts list every field that does not fit.
    """
    params = checked(_Params, fields, file)
    return checked(
        ModelSpec,
        {
            "architecture": "llama" if params.sliding_window is None else "mistral",
            "vocab_size": params.vocab_size if params.vocab_size > 0 else None,
            "hidden_size": params.dim,
            "n_layers": params.n_layers,
            "n_heads": params.n_heads,
            "n_kv_heads": params.n_kv_heads or params.n_heads,
            "head_dim": params.head_dim or max(1, params.dim // params.n_heads),
            "ffn_size": params.hidden_dim
            or ffn_width(params.dim, params.multiple_of, params.ffn_dim_multiplier),
            "norm_eps": params.norm_eps,
            "rope_theta": 10_000.0 if params.rope_theta is None else params.rope_theta,
            "max_seq_len": params.max_seq_len or _max_seq_len(params),
            "rope_scaling": _rope_scaling(params),
            "sliding_window": params.sliding_window,
            "origin": "meta",
            "unaccounted": unaccounted(
                params.model_extra or {}, harmless=_HARMLESS, harmless_if=_HARMLESS_IF
            ),
        },
        file,
    )


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What Meta's code cannot hold of ``spec``."""
    del family
    found = unexpressed(spec, frozenset({"rope_scaling"}), name="Meta's Llama")
    if spec.rope_scaling is not None and not _is_scaled_as_meta(spec.rope_scaling):
        reason = "Meta's Llama stretches as Llama 3.1 does, by a factor"
        found.append(Refusal("rope_scaling", f"{spec.rope_scaling}: {reason}"))
    if spec.head_dim * spec.n_heads != spec.hidden_size:
        reason = "Meta's Llama divides dim by the heads"
        found.append(Refusal("head_dim", f"{spec.head_dim}: {reason}"))
    return tuple(found)


def write(family: str, spec: ModelSpec, wishes: Wishes) -> dict[str, object]:
    """params.json for ``spec``, as Meta's reference code reads it."""
    del family, wishes
    width = solve_ffn(spec.hidden_size, spec.ffn_size)
    fields: dict[str, object] = {
        "dim": spec.hidden_size,
        "n_layers": spec.n_layers,
        "n_heads": spec.n_heads,
        "n_kv_heads": spec.n_kv_heads,
        "vocab_size": spec.vocab_size,
        "multiple_of": width.multiple_of,
        "norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "use_scaled_rope": spec.rope_scaling is not None,
        LENGTH: spec.max_seq_len,
    }
    if width.multiplier is not None:
        fields["ffn_dim_multiplier"] = width.multiplier
    if spec.rope_scaling is not None:
        fields["rope_scaling_factor"] = spec.rope_scaling.parameters.get("factor")
    return fields


def _is_scaled_as_meta(scaling: RopeScaling) -> bool:
    parameters = {key: value for key, value in scaling.parameters.items() if key != "factor"}
    return scaling.kind == "llama3" and parameters == _LLAMA3


def _rope_scaling(params: _Params) -> RopeScaling | None:
    """Llama 3.1 stretches eightfold; the two text models of 3.2, recognised by width, 32-fold."""
    if not params.use_scaled_rope:
        return None
    return RopeScaling(
        kind="llama3",
        parameters={
            "factor": params.rope_scaling_factor or (32.0 if params.dim <= 3072 else 8.0),
            **_LLAMA3,
        },
    )


def _max_seq_len(params: _Params) -> int:
    if params.hidden_dim is not None:
        return 32_768  # Mistral 7B
    if params.use_scaled_rope:
        return 131_072  # Llama 3.1 and later
    if params.rope_theta == 1_000_000.0:
        return 16_384  # Code Llama
    if params.rope_theta is not None:
        return 8192  # Llama 3
    return 2048 if params.norm_eps == 1e-6 else 4096  # Llama 1, Llama 2
