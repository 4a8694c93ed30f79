"""What torchtitan's models can hold; its own configs are Python, so no file is read or written."""

from __future__ import annotations

from dcpconv.configs.parameters import Refusal, unexpressed
from dcpconv.spec import ModelSpec

FAMILIES = (
    "torchtitan-llama3",
    "torchtitan-llama3-2025",
    "torchtitan-qwen3",
    "torchtitan-qwen3-2025",
)


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What a model of torchtitan cannot hold of ``spec``."""
    if family.startswith("torchtitan-llama3"):
        return tuple(unexpressed(spec, frozenset({"rope_scaling"}), name="torchtitan's Llama 3"))
    name = "torchtitan's Qwen3"
    expresses = frozenset({"qk_norm", "experts", "rope_scaling"})
    found = unexpressed(spec, expresses, name=name, requires=frozenset({"qk_norm"}))
    if spec.experts is not None and spec.experts.shared_count:
        found.append(Refusal("experts", f"{spec.experts}: {name} has no shared experts"))
    return tuple(found)
