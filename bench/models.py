"""Models that two ranks load and save: Llamas in bf16, on the meta device, sharded with FSDP2."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.data import llama_shapes


def lingua(hf: Path) -> Any:
    """Lingua's names and shapes, with the head tied to the embedding."""
    model = plain_lingua(hf)
    return _sharded(model, model.layers)


def plain_lingua(hf: Path) -> Any:
    """The same, not sharded."""
    import torch  # noqa: PLC0415 - only ranks need it

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from dcpconv.families import configs  # noqa: PLC0415
    from lingua_model import LinguaModel  # noqa: PLC0415

    params = configs.write_config("lingua", configs.read_spec(hf))
    with torch.device("meta"):
        return LinguaModel.from_params(params, max_seqlen=64).to(torch.bfloat16)


def hugging_face(hf: Path) -> Any:
    """The names of the files."""
    model = plain_llama(hf)
    return _sharded(model, model.get_submodule("model.layers").children())


def plain_llama(hf: Path) -> Any:
    """The same, not sharded."""
    return _module(_shapes(hf))


_OF_TORCHTITAN = (
    ("model.embed_tokens", "tok_embeddings"),
    ("model.", ""),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attention.wo"),
    ("self_attn.q_proj", "attention.qkv_linear.wq"),
    ("self_attn.k_proj", "attention.qkv_linear.wk"),
    ("self_attn.v_proj", "attention.qkv_linear.wv"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("mlp.up_proj", "feed_forward.w3"),
)
"""Parts of names.  Source: torchtitan 0.3.0, ``models/llama3/state_dict_adapter.py``."""


def torchtitan(hf: Path) -> Any:
    """Torchtitan's names of a Llama 3 whose head is tied to the embedding."""
    named = {}
    for key, shape in _shapes(hf).items():
        name = key
        for ours, theirs in _OF_TORCHTITAN:
            name = name.replace(ours, theirs)
        named[name] = shape
    model = _module(named)
    model.add_module("lm_head", _module({}))
    model.lm_head.weight = model.tok_embeddings.weight
    return _sharded(model, model.layers.children())


def _shapes(hf: Path) -> dict[str, tuple[int, ...]]:
    count = json.loads((hf / "config.json").read_text())["num_hidden_layers"]
    return llama_shapes(layers=count)


def _module(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Parameters under these names and nothing else."""
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    model = nn.Module()
    for key, shape in shapes.items():
        *path, name = key.split(".")
        parent = model
        for part in path:
            if part not in parent._modules:  # noqa: SLF001
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(
            name, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        )
    return model


def _sharded(model: Any, layers: Iterable[Any]) -> Any:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model
