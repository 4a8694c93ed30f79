"""MiniMind's config.json: ``LMConfig`` of its first two generations, ``MiniMindConfig`` since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dcpconv.core.dtypes import dtype_named
from dcpconv.core.record import Record, field
from dcpconv.core.spec import Count, Experts, ModelSpec, Positive, RopeScaling, Size
from dcpconv.families.configs.ffn import ffn_width
from dcpconv.families.configs.fields import unaccounted
from dcpconv.families.configs.parameters import Refusal, Wishes, checked, unexpressed

_EXPRESSES: Mapping[str, frozenset[str]] = {
    "minimind1": frozenset({"experts"}),
    "minimind2": frozenset({"experts"}),
    "minimind3": frozenset({"experts", "activation"}),
    "minimind4": frozenset({"experts", "activation", "qk_norm"}),
}
_THETA_1 = 10_000.0
"""What the first generation computes RoPE from; its config has no field for it."""


_HARMLESS_IF: Mapping[str, tuple[object, ...]] = {
    "model_type": ("minimind",),
    "scoring_func": ("softmax",),
}
"""Beside what holds for every config.json; the routers of all generations are softmax."""


class _Config(Record, extra="allow"):
    """The fields of every generation; the defaults are those of the classes."""

    hidden_size: Size = field(names=("hidden_size", "dim"))
    n_layers: Count = field(default=8, names=("num_hidden_layers", "n_layers"))
    n_heads: Count = field(names=("num_attention_heads", "n_heads"))
    n_kv_heads: Count | None = field(default=None, names=("num_key_value_heads", "n_kv_heads"))
    head_dim: Size | None = None
    vocab_size: Size = 6400
    ffn_size: Size | None = field(default=None, names=("intermediate_size", "hidden_dim"))
    multiple_of: Size = 64
    norm_eps: Positive = field(names=("rms_norm_eps", "norm_eps"))
    max_seq_len: Size = field(names=("max_position_embeddings", "max_seq_len"))
    rope_theta: Positive = _THETA_1
    inference_rope_scaling: bool = False
    rope_scaling: dict[str, float | int | str] | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    dtype: str | None = field(default=None, names=("dtype", "torch_dtype"))

    use_moe: bool = False
    per_token: Count = field(default=1, names=("num_experts_per_tok",))
    experts: Count = field(default=4, names=("n_routed_experts", "num_experts"))
    shared_experts: bool | int | None = field(default=None, names=("n_shared_experts",))
    moe_ffn_size: Size | None = field(default=None, names=("moe_intermediate_size",))
    norm_topk_prob: bool = True


_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "minimind1": {"n_heads": 16, "n_kv_heads": 8, "norm_eps": 1e-5, "max_seq_len": 512},
    "minimind2": {"n_heads": 8, "n_kv_heads": 2, "norm_eps": 1e-5, "max_seq_len": 8192},
    "minimind3": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
    },
    "minimind4": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
    },
}
"""Source: jingyaogong/minimind ``model/LMConfig.py`` at 6759da4 and d9453ed,
``model/model_minimind.py`` at c090b69 and d65ef2c."""


def generation(fields: Mapping[str, object]) -> str:
    """The family that a config.json belongs to.

    The first generation has no ``rope_theta``, and the fourth counts ``num_experts``.
    """
    if "dim" in fields:
        return "minimind2" if "rope_theta" in fields else "minimind1"
    return "minimind3" if "n_routed_experts" in fields else "minimind4"


def read(fields: Mapping[str, object], file: Path) -> ModelSpec:
    """The model that a MiniMind config.json describes.

    Raises:
        SpecError: Facts list every field that does not fit.
    """
    family = generation(fields)
    known = {name: value for name, value in fields.items() if value is not None}
    if family in {"minimind1", "minimind2"}:
        # These classes ask whether it is None; where the field is left out, it is True.
        known["n_shared_experts"] = fields.get("n_shared_experts", True) is not None
    config = checked(_Config, {**_DEFAULTS[family], **known}, file)
    is_new = family == "minimind4"
    scaling = config.rope_scaling if config.inference_rope_scaling else None
    dense = "qwen3" if is_new else "llama"
    sparse = "qwen3_moe" if is_new else "ernie4_5_moe"
    return checked(
        ModelSpec,
        {
            "architecture": sparse if config.use_moe else dense,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "n_kv_heads": config.n_kv_heads or config.n_heads,
            "head_dim": config.head_dim or config.hidden_size // config.n_heads,
            "ffn_size": _ffn_size(config),
            "norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": RopeScaling(
                kind=str(scaling.get("type", "yarn")),
                parameters={key: value for key, value in scaling.items() if key != "type"},
            )
            if scaling
            else None,
            "max_seq_len": config.max_seq_len,
            "tied": config.tie_word_embeddings if is_new else True,
            "dtype": config.dtype,
            "qk_norm": is_new,
            "activation": config.hidden_act,
            "experts": _experts(config, family) if config.use_moe else None,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "origin": family,
            "unaccounted": unaccounted(
                config.model_extra or {},
                harmless_if={**_HARMLESS_IF, "rope_parameters": (_plain_rope(config.rope_theta),)},
            ),
        },
        file,
    )


def _plain_rope(theta: float) -> dict[str, object]:
    """What transformers 5 writes for any class, beside the field that MiniMind reads."""
    return {"rope_theta": theta, "rope_type": "default"}


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What a generation of MiniMind cannot hold of ``spec``."""
    name = f"MiniMind generation {family[-1]}"
    requires = frozenset({"qk_norm"}) if family == "minimind4" else frozenset[str]()
    found = unexpressed(spec, _EXPRESSES[family], requires=requires, name=name)
    is_new = family == "minimind4"
    if not is_new:
        if not spec.tied:
            found.append(Refusal("untied", f"{name} always ties the head to the embedding"))
        if spec.head_dim * spec.n_heads != spec.hidden_size:
            reason = f"{name} divides the hidden size by the heads"
            found.append(Refusal("head_dim", f"{spec.head_dim}: {reason}"))
    if family == "minimind1" and spec.rope_theta != _THETA_1:
        reason = f"{name} computes RoPE from {_THETA_1:g}"
        found.append(Refusal("rope_theta", f"{spec.rope_theta:g}: {reason}"))
    if spec.experts is not None:
        found += [Refusal("experts", f"{why} {name}") for why in _unfit(spec.experts, family)]
    return tuple(found)


def write(family: str, spec: ModelSpec, wishes: Wishes) -> dict[str, object]:
    """config.json of a generation for ``spec``, in the order it should be printed."""
    experts = spec.experts
    width = experts.ffn_size if experts else spec.ffn_size
    fields: dict[str, object] = {"model_type": "minimind"}
    if family in {"minimind1", "minimind2"}:
        fields |= {
            "architectures": ["Transformer" if family == "minimind1" else "MiniMindLM"],
            "dim": spec.hidden_size,
            "n_layers": spec.n_layers,
            "n_heads": spec.n_heads,
            "n_kv_heads": spec.n_kv_heads,
            "vocab_size": spec.vocab_size,
            "hidden_dim": width,
            "multiple_of": 64,
            "norm_eps": spec.norm_eps,
            "max_seq_len": spec.max_seq_len,
        }
        if family == "minimind2":
            fields["rope_theta"] = spec.rope_theta
    else:
        fields |= {
            "architectures": ["MiniMindForCausalLM"],
            "hidden_size": spec.hidden_size,
            "num_hidden_layers": spec.n_layers,
            "num_attention_heads": spec.n_heads,
            "num_key_value_heads": spec.n_kv_heads,
            "vocab_size": spec.vocab_size,
            "intermediate_size": width,
            "max_position_embeddings": spec.max_seq_len,
            "rms_norm_eps": spec.norm_eps,
            "rope_theta": spec.rope_theta,
            "inference_rope_scaling": False,
            "hidden_act": spec.activation,
            "bos_token_id": spec.bos_token_id,
            "eos_token_id": spec.eos_token_id,
        }
    fields |= {"dropout": 0.0, "flash_attn": True, "use_moe": experts is not None}
    if family == "minimind4":
        fields |= {
            "head_dim": spec.head_dim,
            "tie_word_embeddings": spec.tied,
            "num_experts": experts.count if experts else 4,
            "num_experts_per_tok": experts.per_token if experts else 1,
            "moe_intermediate_size": width,
            "norm_topk_prob": experts.norm_topk if experts else True,
        }
    else:
        shared = experts.shared_count if experts else 1
        fields |= {
            "num_experts_per_tok": experts.per_token if experts else 2,
            "n_routed_experts": experts.count if experts else 4,
            "n_shared_experts": shared if family == "minimind3" else bool(shared) or None,
            "scoring_func": "softmax",
            "aux_loss_alpha": 0.1,
            "seq_aux": True,
            "norm_topk_prob": experts.norm_topk or experts.per_token == 1 if experts else True,
        }
    known = dtype_named(wishes.dtype or spec.dtype or "")
    if known is not None:
        fields |= {"torch_dtype": known.name}
    return fields


def _ffn_size(config: _Config) -> int:
    return config.ffn_size or ffn_width(config.hidden_size, config.multiple_of, None)


def _experts(config: _Config, family: str) -> Experts:
    width = _ffn_size(config)
    if family == "minimind4":
        shared, width = 0, config.moe_ffn_size or width
    else:
        shared = int(config.shared_experts or 0)
    # The first three generations leave the weight of a single expert as it is.
    renormalises = family == "minimind4" or config.per_token > 1
    return Experts(
        count=config.experts,
        per_token=config.per_token,
        ffn_size=width,
        shared_count=shared,
        shared_ffn_size=width if shared else None,
        norm_topk=config.norm_topk_prob and renormalises,
    )


def _unfit(experts: Experts, family: str) -> list[str]:
    found = []
    if experts.scoring != "softmax":
        found.append(f"{experts.scoring} scores: softmax in")
    if experts.selection_bias:
        found.append("a selection bias: none in")
    if experts.groups > 1 or experts.routed_scale != 1.0:
        found.append("groups or a scale: none in")
    if experts.dense_layers:
        found.append(f"{len(experts.dense_layers)} dense layers: experts in all of")
    shared = experts.shared_count
    most = {"minimind3": shared, "minimind4": 0}.get(family, 1)
    if shared > most:
        found.append(f"{shared} shared: {most} in")
    elif shared and experts.shared_ffn_size != experts.ffn_size:
        found.append(f"shared width {experts.shared_ffn_size}: {experts.ffn_size} as all in")
    if family != "minimind4" and experts.per_token == 1 and experts.norm_topk:
        found.append("a single expert's weight made one: left as it is in")
    return found
