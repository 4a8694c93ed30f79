"""Every key that a class of transformers makes of a config is in one row of its table, no other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from dcpconv.families.configs import read_spec
from dcpconv.families.keymaps import resolve_family
from dcpconv.sources.parameter_shapes import expected
from support.checkpoints.families import hf_tensors
from support.models.hf_models import MODEL_TYPES, save_hf, tiny

STRUCTURES: Mapping[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 2]},
        {"mlp_only_layers": [0, 1, 2]},
        {"num_experts": 0},
    ],
    "ernie4_5_moe": [
        {"moe_num_shared_experts": 0},
        {"moe_num_shared_experts": 1},
        {"moe_layer_start_index": 0},
        {"moe_layer_start_index": 3},
        {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
        {"moe_layer_end_index": -1},
        {"moe_layer_end_index": 3},
        {"moe_layer_interval": 2},
    ],
    "gemma4_text": [
        {"num_kv_shared_layers": 1},
        {"hidden_size_per_layer_input": 0},
        {"num_global_key_value_heads": None},
        {"layer_types": None},
    ],
    "cohere2_moe": [
        {"num_shared_experts": 0},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"prefix_dense_intermediate_size": None},
    ],
    "laguna": [
        {"num_attention_heads_per_layer": None},
        {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    ],
    "mimo_v2_flash": [
        {"layer_types": None},
        {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    ],
    "granitemoeshared": [{"shared_intermediate_size": 0}],
    "deepseek_v3": [
        {"q_lora_rank": None},
        {"n_shared_experts": 0},
        {"n_shared_experts": 2},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"num_nextn_predict_layers": 1},
    ],
}
"""Fields other than switches that decide which layers and modules there are."""

STRAY = {"attention_bias": True, "mlp_bias": True, "use_bias": True}
"""Switches that some class has and that others carry in their files without heeding them."""

TOGETHER: Mapping[str, dict[str, bool]] = {
    "internlm3": {"attention_bias": True, "mlp_bias": True},
}
"""Switches that the class takes together only."""


BEYOND: Mapping[str, frozenset[str]] = {
    "falcon": frozenset({"parallel_attn"}),
    "gpt2": frozenset({"add_cross_attention"}),
    "laguna": frozenset({"moe_apply_router_weight_on_input"}),
}
"""Switches that make another kind of model, with layers that look at an encoder, or that make none
that can be run together with others."""


def switches(model_type: str) -> dict[str, bool]:
    """The booleans of a config class, each turned away from its default."""
    config = CONFIG_MAPPING[model_type]
    kinds = inspect.get_annotations(config)
    beyond = BEYOND.get(model_type, frozenset())
    names = [name for name, kind in kinds.items() if "bool" in str(kind) and name not in beyond]
    return {name: not getattr(config, name) for name in names}


def _variants() -> Iterator[Any]:
    for model_type in MODEL_TYPES:
        turned = switches(model_type)
        together = TOGETHER.get(model_type, {})
        for name, value in turned.items():
            changes = together if name in together else {name: value}
            yield pytest.param(model_type, changes, id=f"{model_type}-{name}")
        for structure in ({}, *STRUCTURES.get(model_type, [])):
            shown = "".join(f"-{name}={value}" for name, value in structure.items())
            name = f"{model_type}{shown.replace(' ', '')}"
            yield pytest.param(model_type, structure, id=name)
            yield pytest.param(model_type, structure | turned | STRAY, id=f"{name}-all-switches")


def test_the_switches_of_a_class_are_found() -> None:
    assert switches("llama").items() >= {"attention_bias": True, "mlp_bias": True}.items()
    assert switches("ernie4_5_moe").items() >= {"use_bias": True}.items()
    assert switches("glm").items() >= {"attention_bias": False}.items()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize(("model_type", "changes"), list(_variants()))
def test_every_key_is_in_one_row_and_no_row_lacks_its_key(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    model = tiny(model_type, **changes)
    directory = save_hf(model, tmp_path)
    spec = read_spec(directory)
    for family, tensors in (("hf", hf_tensors(directory)), ("hf-memory", model.state_dict())):
        table = resolve_family(family, model_type)
        rows = [(key, shape) for key, shape, _ in expected(table, spec)]
        wanted = dict(rows)
        assert len(wanted) == len(rows)
        if spec.tied and family == "hf-memory":
            wanted |= {tie.key: wanted[tie.owner] for tie in table.ties}
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == wanted
