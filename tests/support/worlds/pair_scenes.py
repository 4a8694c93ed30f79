"""Scenes for ``dist_worlds``: FSDP2 models of one naming from checkpoints of the other.

Run as a script by ``launch``; ``prepare`` writes what the scenes read.  What each rank should hold
is what one process converts, whose logits other tests compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dcpconv import convert
from dcpconv.checking.check import check
from dcpconv.families.configs.by_kind import BY_KIND
from dcpconv.families.configs.mixtures import MIXTURES
from dcpconv.loading.init_weights import load_init_weights
from support.models.hf_models import save_hf, tiny
from support.models.layers import randomise
from support.models.nested_models import NESTED, small
from support.worlds.dist_worlds import Scene, take_part

IN_TURN = {
    "use_parallel_residual": False,
    "num_key_value_heads": 6,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0},
}
"""GPT-NeoX as the classes compute that have attention and feed-forward in turn."""

Pair = tuple[str, Mapping[str, Any], str]
"""Class, switches, the other naming."""

PAIRS: Mapping[str, Pair] = {
    "qwen3_5-torchtitan": ("qwen3_5", {}, "torchtitan-qwen3_5"),
    "qwen3_5_moe-torchtitan": ("qwen3_5_moe", {"num_experts": 11}, "torchtitan-qwen3_5"),
    "qwen3_5_moe-memory": ("qwen3_5_moe", {}, "hf-memory-qwen3_5_moe"),
    **{
        f"{name}-memory": (name, {}, f"hf-memory-{name}")
        for name in ("gemma3", "qwen2_5_vl", "mistral3", "internvl")
    },
    "qwen3_next-memory": ("qwen3_next", {}, "hf-memory-qwen3_next"),
    "muse_glimmer-torchtitan": ("muse_glimmer", {}, "torchtitan-muse_glimmer"),
    "gpt_oss-torchtitan": ("gpt_oss", {}, "torchtitan-gpt_oss"),
    **{f"{name}-memory": (name, {}, "hf-memory") for name in (*MIXTURES, *BY_KIND)},
    "llama4_text-meta": ("llama4_text", {}, "meta-memory-llama4"),
    "deepseek_v2-torchtitan": ("deepseek_v2", {}, "torchtitan-deepseek_v3"),
    "glm4_moe_lite-torchtitan": ("glm4_moe_lite", {}, "torchtitan-deepseek_v3"),
    "deepseek_v3-glm4_moe_lite": ("deepseek_v3", {}, "hf-memory-glm4_moe_lite"),
    "dots1-glm4_moe": ("dots1", {"num_hidden_layers": 11}, "hf-memory-glm4_moe"),
    "hy_v3-dots1": ("hy_v3", {}, "hf-memory-dots1"),
    "solar_open-glm4_moe": ("solar_open", {}, "hf-memory-glm4_moe"),
    "granitemoe-mixtral": ("granitemoe", {}, "hf-memory-mixtral"),
    "falcon-gpt_neox": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 6, "bias": True},
        "hf-gpt_neox",
    ),
    "starcoder2-falcon": ("starcoder2", {"num_key_value_heads": 1}, "hf-falcon"),
    "smollm3-llama-base": ("smollm3", {}, "hf-llama"),
    "gpt_neox-falcon-base": ("gpt_neox", IN_TURN, "hf-falcon"),
    "llama-torchtitan-base": ("llama", {"tie_word_embeddings": True}, "torchtitan-llama3"),
    "seed_oss-llama-texts": ("seed_oss", {"attention_bias": False}, "hf-llama"),
    "gpt_neox-starcoder2-tokens": ("gpt_neox", IN_TURN, "hf-starcoder2"),
    "llama-smollm3-answers": ("llama", {}, "hf-smollm3"),
}
"""Name -> a tiny Hugging Face model, and the other naming."""

CLASSES: Mapping[str, str] = {
    "smollm3-llama-base": "SmolLM3Model",
    "gpt_neox-falcon-base": "GPTNeoXModel",
    "llama-torchtitan-base": "LlamaModel",
    "seed_oss-llama-texts": "SeedOssForSequenceClassification",
    "gpt_neox-starcoder2-tokens": "GPTNeoXForTokenClassification",
    "llama-smollm3-answers": "LlamaForQuestionAnswering",
}
"""Name -> its class, where that gives no logits."""


def prepare(directory: Path, pairs: Mapping[str, Pair] = PAIRS) -> None:
    """Write each model in both namings."""
    for name, pair in pairs.items():
        source, to = save_hf(_made(name, pair), directory / name / "hf"), pair[2]
        convert(source, directory / name / "other.pth", to=to)
        convert(source, directory / name / "dcp", to=to)


def _made(name: str, pair: Pair) -> Any:
    model_type, overrides, _ = pair
    make = small if model_type in NESTED else tiny
    model = make(model_type, **overrides)
    if name not in CLASSES:
        return model
    config = model.config
    config.num_labels, config.pad_token_id = 2, 0
    headed = getattr(transformers, CLASSES[name])(config)
    randomise(headed)
    return headed


class Shell(nn.Module):
    """A model that is nothing but its parameters, under the keys that they are given."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in tensors.items():
            *path, name = key.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(name, nn.Parameter(torch.full_like(tensor, -7.0)))


def _assert_shards(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Every rank holds its part of every expected tensor, and of no other."""
    found = dict(model.named_parameters())
    assert found.keys() <= expected.keys()
    assert len(found) > 20
    for key, tensor in found.items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), expected[key]), key


def _to_other(name: str, pair: Pair) -> Scene:
    def scene(directory: Path) -> None:
        expected = torch.load(directory / name / "other.pth", weights_only=True)
        model: nn.Module = Shell(expected)
        fully_shard(model)
        load_init_weights(model, directory / name / "hf", to=pair[2])
        _assert_shards(model, expected)
        assert check(directory / name / "hf", against=model)

    return scene


def _from_other(name: str, pair: Pair, source: str) -> Scene:
    def scene(directory: Path) -> None:
        right, to = _made(name, pair), pair[2]
        expected = dict(right.state_dict())
        with torch.device("meta"):
            model: nn.Module = type(right)(right.config)
            fully_shard(model)
        home = directory / name
        load_init_weights(model, home / source, assets=home / "hf", from_=to)
        _assert_shards(model, expected)

    return scene


def scenes_of(pairs: Mapping[str, Pair]) -> dict[str, Scene]:
    """Each pair in both directions, the way back from two forms."""
    return {
        **{f"{name}/to-other": _to_other(name, pair) for name, pair in pairs.items()},
        **{f"{n}/from-pth": _from_other(n, pair, "other.pth") for n, pair in pairs.items()},
        **{f"{name}/from-dcp": _from_other(name, pair, "dcp") for name, pair in pairs.items()},
    }


SCENES: dict[int, dict[str, Scene]] = {2: scenes_of(PAIRS)}

if __name__ == "__main__":
    take_part(SCENES)
