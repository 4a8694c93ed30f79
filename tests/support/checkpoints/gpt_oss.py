"""gpt-oss as it is published: experts in MXFP4, everything else in bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

EXPERTS = 3
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def config(**overrides: Any) -> Any:
    """A tiny model: no size is another's, but for what MXFP4 asks: multiples of 32."""
    from transformers import GptOssConfig

    return GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=37,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        dtype="bfloat16",
        tie_word_embeddings=False,
        **{**SIZES, **overrides},
    )


def model(**overrides: Any) -> Any:
    """The same, with weights that a seed gives."""
    from transformers import GptOssForCausalLM

    torch.manual_seed(5)
    return GptOssForCausalLM(config(**overrides)).to(torch.bfloat16).eval()


def packed(experts: int, rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random blocks and exponents that keep numbers near 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, rows, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(117, 124, shape, generator=generator, dtype=torch.uint8)
    return blocks, scales


def published(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """Two shard files and a config; returns the directory and what its tensors are worth."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    worth = {key: tensor.clone() for key, tensor in model().state_dict().items()}
    stored: dict[str, Tensor] = {}
    for seed, (key, tensor) in enumerate(worth.items()):
        if not key.endswith(("gate_up_proj", "down_proj")):
            stored[key] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks, scales = packed(experts, outputs, inputs, seed)
        stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
        worth[key] = convert_moe_packed_tensors(blocks, scales)
    directory.mkdir(parents=True)
    fields = config().to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        },
    }
    (directory / "config.json").write_text(json.dumps(fields))
    # Exponents and their blocks in different files, as a shard's end may have it.
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        some = {key: stored[key] for key in stored if key.endswith("_scales") == (number == 2)}
        save_file(some, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, name)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory, worth
