"""Checkpoints to convert, written without torch: bytes that do not compress, real key names."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

MIB = 1 << 20
BF16 = 2
_WEIGHT = b"\xff\x87", b"\x00\x38"
"""Bits of a bf16 element, little-endian, that are random, and those that are set."""


def llama_shapes(*, layers: int = 16) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of Llama-3.2-1B, with another number of layers; 16 make 2.47 GB in bf16."""
    hidden, ffn, kv = 2048, 8192, 512
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.mlp.down_proj.weight": (hidden, ffn),
            f"{at}.mlp.gate_proj.weight": (ffn, hidden),
            f"{at}.mlp.up_proj.weight": (ffn, hidden),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def llama_config(*, layers: int = 16) -> dict[str, object]:
    """A ``config.json`` for ``llama_shapes``; no RoPE scaling, so that Lingua can hold it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def write_llama(directory: Path, *, gigabytes: float) -> Path:
    """An HF directory of about this size, in one file, with random weights."""
    layers = max(1, round((gigabytes * 1e9 - 525e6) / 121.6e6))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(llama_config(layers=layers), indent=2))
    write_safetensors(directory / "model.safetensors", llama_shapes(layers=layers))
    return directory


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """One bf16 file of random weights: of all signs and mantissas, between 2**-15 and 2.

    Mere random bytes would hold infinities, which no checkpoint has and which cost casts time.
    """
    head, nbytes = header(shapes)
    rng = random.Random(0)  # noqa: S311  any incompressible bytes will do
    with path.open("wb") as file:
        file.write(head)
        while nbytes:
            length = min(16 * MIB, nbytes)
            bits = int.from_bytes(rng.randbytes(length), "little")
            mask, ones = (int.from_bytes(w * (length // 2), "little") for w in _WEIGHT)
            file.write((bits & mask | ones).to_bytes(length, "little"))
            nbytes -= length
        os.fsync(file.fileno())


def header(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: str = "BF16", itemsize: int = BF16
) -> tuple[bytes, int]:
    """The header of a file and the bytes that follow it."""
    records: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, shape in shapes.items():
        nbytes = itemsize
        for length in shape:
            nbytes *= length
        records[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(records, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, position


def deepseek_shapes(
    *, layers: int = 61, experts: int = 256
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of DeepSeek-V3's layers in fp8 with block scales: about 91,000 tensors.

    Source: the published ``config.json`` and index of DeepSeek-V3; 671e9 parameters.
    """
    hidden, moe, dense, heads = 7168, 2048, 18432, 128

    def scaled(key: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{key}.weight", (rows, columns)
        yield f"{key}.weight_scale_inv", (-(-rows // 128), -(-columns // 128))

    yield "model.embed_tokens.weight", (129280, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield from scaled(f"{at}.self_attn.q_a_proj", 1536, hidden)
        yield f"{at}.self_attn.q_a_layernorm.weight", (1536,)
        yield from scaled(f"{at}.self_attn.q_b_proj", heads * 192, 1536)
        yield from scaled(f"{at}.self_attn.kv_a_proj_with_mqa", 576, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", (512,)
        yield from scaled(f"{at}.self_attn.kv_b_proj", heads * 256, 512)
        yield from scaled(f"{at}.self_attn.o_proj", hidden, heads * 128)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if layer < 3:
            yield from scaled(f"{at}.mlp.gate_proj", dense, hidden)
            yield from scaled(f"{at}.mlp.up_proj", dense, hidden)
            yield from scaled(f"{at}.mlp.down_proj", hidden, dense)
            continue
        yield f"{at}.mlp.gate.weight", (experts, hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", (experts,)
        for name in (*(f"experts.{expert}" for expert in range(experts)), "shared_experts"):
            yield from scaled(f"{at}.mlp.{name}.gate_proj", moe, hidden)
            yield from scaled(f"{at}.mlp.{name}.up_proj", moe, hidden)
            yield from scaled(f"{at}.mlp.{name}.down_proj", hidden, moe)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (129280, hidden)


def write_sparse(directory: Path, shapes: Mapping[str, tuple[int, ...]], *, files: int) -> int:
    """An HF directory whose tensors are holes: real headers, no data.  Returns its apparent bytes.

    bf16 throughout, so that a 671B shape is 1.34 TB, as published exports in bf16 are.
    """
    directory.mkdir(parents=True)
    keys = list(shapes)
    per_file = -(-len(keys) // files)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:06d}.safetensors"
        mine = {key: shapes[key] for key in keys[number * per_file : (number + 1) * per_file]}
        head, nbytes = header(mine)
        with (directory / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + nbytes)
        weight_map |= dict.fromkeys(mine, name)
        total += nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
