"""What torchtitan's models can hold; its own configs are Python, so no file is read or written."""

from __future__ import annotations

from dcpconv.core.spec import ModelSpec
from dcpconv.families.configs.parameters import Refusal, unexpressed


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
    name = "torchtitan's Qwen3"
    expresses = frozenset({"qk_norm", "experts"})
    found = unexpressed(spec, expresses, name=name, requires=frozenset({"qk_norm"}))
    if spec.experts is not None and spec.experts.shared_count:
        found.append(Refusal("experts", f"{spec.experts}: {name} has no shared experts"))
    return tuple(found)
