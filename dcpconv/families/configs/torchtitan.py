"""What torchtitan's models can hold; its own configs are Python, so no file is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.core.spec import ModelSpec, RopeScaling
from dcpconv.families.configs.experts import unfit
from dcpconv.families.configs.model_type import SIGMOID
from dcpconv.families.configs.parameters import Refusal, unexpressed

_EPS = 1e-6
"""Source: ``_EPS`` of ``models/qwen3_5/__init__.py`` in torchtitan 0.3.0."""


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What a model of torchtitan cannot hold of ``spec``.

    Source: torchtitan 0.2.2 and 0.3.0.  Its Llama 3 stretches RoPE as Llama 3.1 does.  Its Qwen3
    does not, or by YaRN without the factor that transformers puts on attention.
    """
    scaling = spec.rope_scaling
    if family.startswith("torchtitan-llama3"):
        is_known = scaling is not None and scaling.kind == "llama3"
        expresses = frozenset({"rope_scaling"} if is_known else ())
        return tuple(unexpressed(spec, expresses, name="torchtitan's Llama 3"))
    if family.startswith("torchtitan-muse_glimmer"):
        return _muse_glimmer(spec)
    if family.startswith(("torchtitan-deepseek", "torchtitan-kimi")):
        return _deepseek(spec)
    if family.startswith("torchtitan-gpt_oss"):
        return _gpt_oss(spec)
    if family.startswith("torchtitan-qwen3_5"):
        return _qwen3_5(spec)
    name = "torchtitan's Qwen3"
    expresses = frozenset({"qk_norm", "experts"})
    found = unexpressed(spec, expresses, name=name, requires=frozenset({"qk_norm"}))
    if spec.experts is not None and spec.experts.shared_count:
        found.append(Refusal("experts", f"{spec.experts}: {name} has no shared experts"))
    return tuple(found)


def _deepseek(spec: ModelSpec) -> tuple[Refusal, ...]:
    """Source: torchtitan 0.3.0 ``models/deepseek_v3/model.py`` and ``models/common/rope.py``: YaRN
    turns without a factor of its own; one number, ``mscale``, scales attention by its square.
    ``models/common/moe.py``: groups compete by the sum of their two best, as in DeepSeek-V3, and
    not by their best, as softmax scores do in DeepSeek-V2."""
    name = "torchtitan's DeepSeek-V3"
    requires = frozenset({"experts", "latent_attention"})
    scaling = spec.rope_scaling
    is_known = scaling is not None and _is_yarn_of_one_scale(scaling)
    expresses = requires | (frozenset({"rope_scaling"}) if is_known else frozenset())
    found = unexpressed(spec, expresses, name=name, requires=requires)
    if spec.experts is not None:
        scoring = spec.experts.scoring
        routing = replace(SIGMOID, scoring=scoring, groups=scoring == SIGMOID.scoring)
        reasons = unfit(routing, spec.experts, name, spec.n_layers)
        found += [Refusal("experts", why) for why in reasons]
    if spec.tied:
        found.append(Refusal("tied", f"head and embedding: {name} has two tensors"))
    return tuple(found)


def _gpt_oss(spec: ModelSpec) -> tuple[Refusal, ...]:
    """Source: torchtitan 0.3.0 ``models/gpt_oss/model.py`` and ``moe.py``: YaRN scales attention as
    transformers does where the file names no factor; ``swiglu`` has one alpha."""
    name = "torchtitan's gpt-oss"
    requires = frozenset({"experts", "sinks", "clamped_glu", "expert_bias"})
    expresses = requires | {"qkv_bias", "o_bias", "sliding_window", "layer_types"}
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "yarn":
        named = [
            n for n in ("attention_factor", "mscale", "mscale_all_dim") if n in scaling.parameters
        ]
        expresses |= set() if named else {"rope_scaling"}
    found = unexpressed(spec, expresses, name=name, requires=requires)
    if spec.glu_limit is not None and spec.glu_alpha != _ALPHA:
        found.append(Refusal("clamped_glu", f"alpha {spec.glu_alpha}: {name} has {_ALPHA}"))
    return tuple(found)


_ALPHA = 1.702


def _qwen3_5(spec: ModelSpec) -> tuple[Refusal, ...]:
    """Source: torchtitan 0.3.0 ``models/qwen3_5/__init__.py``: no biases but in the vision encoder,
    SiLU, weights of the chosen experts that sum to one."""
    name = "torchtitan's Qwen3.5"
    requires = frozenset({"norm", "qk_norm"})
    expresses = requires | {"partial_rotary", "layer_types", "experts"}
    found = unexpressed(spec, expresses, name=name, requires=requires)
    if spec.norm_eps != _EPS:
        found.append(Refusal("norm_eps", f"{spec.norm_eps}: {name} has {_EPS}"))
    return tuple(found)


def _muse_glimmer(spec: ModelSpec) -> tuple[Refusal, ...]:
    """Source: torchtitan 0.3.0 ``models/muse_glimmer/__init__.py``, ``model.py``: projections
    without biases and SiLU; the embedding lies beside its norm, where no head can share it."""
    name = "torchtitan's Muse Glimmer"
    requires = frozenset({"norm", "post_norms", "attention_gate", "bare_norms", "final_softcap"})
    expresses = requires | {"no_rope_layers", "sliding_window", "layer_types", "logits_scaling"}
    found = unexpressed(spec, expresses, name=name, requires=requires)
    if spec.tied:
        found.append(Refusal("tied", f"head and embedding: {name} has two tensors"))
    for holder, field in (("vision_config", "hidden_act"), ("", "projector_hidden_act")):
        inner = spec.stated.get(holder) if holder else spec.stated
        value = inner.get(field) if isinstance(inner, Mapping) else None
        if value not in {None, "gelu"}:
            place = f"{holder}.{field}".lstrip(".")
            found.append(Refusal(f"config.{place}", f"{value}: {name} has gelu"))
    return tuple(found)


def _is_yarn_of_one_scale(scaling: RopeScaling) -> bool:
    stated = scaling.parameters
    scale = stated.get("mscale_all_dim")
    return (
        scaling.kind == "yarn"
        and bool(scale)
        and stated.get("mscale") == scale
        and not stated.get("attention_factor")
    )
