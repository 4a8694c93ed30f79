"""Mixtures of experts: what config.json says of them, and why a class computes something else."""

from __future__ import annotations

from pathlib import Path

from dcpconv.core.spec import Experts
from dcpconv.families.configs.hf_fields import HfConfig
from dcpconv.families.configs.model_type import ModelType, Routing
from dcpconv.families.configs.parameters import checked

_ONE_SHARED = frozenset({"hunyuan_v1_moe", "llama4_text"})
"""Classes with one shared expert, as wide as a routed one."""

BY_LAYER = frozenset(
    {
        *("deepseek_v32", "exaone_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "mellum"),
        *("mimo_v2_flash", "laguna", "cohere2_moe"),
    }
)
"""Classes that look at ``mlp_layer_types``."""


def read_experts(config: HfConfig, known: ModelType | None, file: Path) -> Experts | None:
    """The experts that a config describes, or ``None`` for none.

    Args:
        config: What every class says.
        known: Its class.
        file: For errors.
    """
    if not config.num_experts:
        return None
    width = config.moe_intermediate_size or config.intermediate_size
    shared, shared_width = config.n_shared_experts or 0, config.shared_expert_intermediate_size
    if config.model_type in _ONE_SHARED:
        shared = 1
    if shared_width and not shared:
        # One block as wide as several experts computes what they do side by side.
        shared, rest = divmod(shared_width, width)
        shared, shared_width = (1, shared_width) if rest else (shared, width)
    return checked(
        Experts,
        {
            "count": config.num_experts,
            "per_token": config.num_experts_per_tok,
            "ffn_size": width,
            "shared_count": shared,
            "shared_ffn_size": (shared_width or width) if shared else None,
            "norm_topk": config.norm_topk_prob,
            "dense_layers": tuple(
                layer for layer in range(config.num_hidden_layers) if _is_dense(config, layer)
            ),
            "routed_scale": config.routed_scaling_factor,
            **_groups(config),
            **(known.experts if known else {}),
        },
        file,
    )


def _groups(config: HfConfig) -> dict[str, int]:
    """Source: ``DeepseekV2TopkRouter`` of transformers 5.23.0: no groups unless the method says."""
    method = (config.model_extra or {}).get("topk_method")
    if config.model_type == "deepseek_v2" and method != "group_limited_greedy":
        return {}
    return {"groups": config.n_group or 1, "top_groups": config.topk_group or 1}


def _is_dense(config: HfConfig, layer: int) -> bool:
    """Source: the ``*DecoderLayer`` classes of transformers 5.23.0."""
    if config.model_type == "ernie4_5_moe":
        end = config.moe_layer_end_index
        last = config.num_hidden_layers - 1 if end == -1 else end
        is_due = (layer + 1) % config.moe_layer_interval == 0
        return not (is_due and config.moe_layer_start_index <= layer <= last)
    kinds = (config.model_extra or {}).get("mlp_layer_types")
    if config.model_type in BY_LAYER and isinstance(kinds, list):
        return layer >= len(kinds) or kinds[layer] != "sparse"
    if config.model_type == "llama4_text":
        return not has_llama4(config, layer)
    skipped = layer in (config.mlp_only_layers or ())
    return (
        skipped
        or layer < config.first_k_dense_replace
        or (layer + 1) % config.decoder_sparse_step != 0
    )


def has_llama4(config: HfConfig, layer: int) -> bool:
    """Whether a layer of Llama 4 has experts.

    Source: ``Llama4TextConfig.__post_init__`` of transformers 5.23.0.
    """
    stated = (config.model_extra or {}).get("moe_layers")
    step = (config.model_extra or {}).get("interleave_moe_layer_step")
    if isinstance(stated, list):
        return layer in stated
    return isinstance(step, int) and step > 0 and (layer + 1) % step == 0


def unfit(routing: Routing, experts: Experts, name: str, n_layers: int) -> list[str]:
    """Why a class computes something else from these experts.

    Args:
        routing: What the class can hold.
        experts: Those of the model.
        name: Of the class, for the reasons.
        n_layers: Of the model.

    Source: the ``*TopKRouter`` and ``*MoE`` classes of transformers 5.23.0.
    """
    found = []
    if experts.scoring != routing.scoring:
        found.append(f"{experts.scoring} scores: {name} has {routing.scoring}")
    if experts.groups > 1 and not routing.groups:
        found.append(f"{experts.groups} groups: {name} has none")
    if experts.routed_scale != 1.0 and not routing.scaled:
        found.append(f"scaled by {experts.routed_scale}: {name} does not scale")
    if experts.selection_bias and not routing.selection_bias:
        found.append(f"a selection bias: {name} has none")
    if routing.norm_topk is not None and experts.norm_topk != routing.norm_topk:
        sums, does = ("sum", "do not") if experts.norm_topk else ("do not sum", "do")
        found.append(f"weights {sums} to one: in {name} they {does}")
    return [
        *found,
        *_unfit_shared(routing, experts, name),
        *_unfit_dense(routing, experts, name, n_layers),
    ]


def _unfit_shared(routing: Routing, experts: Experts, name: str) -> list[str]:
    found = []
    if experts.shared_count and routing.shared == "none":
        return [f"{experts.shared_count} shared: {name} has none"]
    if experts.shared_gate and not routing.shared_gate:
        found.append(f"a gate on what shared experts add: {name} has none")
    if routing.shared_gate and not experts.shared_gate:
        found.append(f"no gate on what shared experts add: every {name} has one")
    width = shared_width(experts)
    if routing.shared == "whole" and width % experts.ffn_size:
        found.append(f"shared width {width}: {name} wants a multiple of {experts.ffn_size}")
    return found


def _unfit_dense(routing: Routing, experts: Experts, name: str, n_layers: int) -> list[str]:
    dense = experts.dense_layers
    which = f"dense layers {', '.join(map(str, dense))}: {name} has"
    if dense and routing.dense == "none":
        return [f"{len(dense)} dense layers: {name} has experts in all"]
    if routing.dense == "first" and dense != tuple(range(len(dense))):
        return [f"{which} them first"]
    if routing.dense == "strided" and strided(experts, n_layers) is None:
        return [f"{which} experts at a stride"]
    return []


def strided(experts: Experts, n_layers: int) -> tuple[int, int, int] | None:
    """First and last layer with experts and the step between them, counted as ERNIE counts it, or
    ``None`` where there is no such step."""
    sparse = [layer for layer in range(n_layers) if layer not in experts.dense_layers]
    if not sparse:
        return n_layers, n_layers, 1
    step = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    first, last = sparse[0], sparse[-1]
    is_due = sparse == list(range(first, last + 1, step)) and (first + 1) % step == 0
    return (first, last, step) if is_due else None


def shared_width(experts: Experts) -> int:
    """Width of all shared experts together."""
    return experts.shared_count * (experts.shared_ffn_size or 0)
