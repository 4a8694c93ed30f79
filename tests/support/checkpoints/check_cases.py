"""Small checkpoints of headers alone, and every way in which one may not fit.

The tensors are holes in sparse files: a check reads no bytes of them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB = 5, 96, 6, 2, 152, 131
CONFIG: Mapping[str, object] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def llama_shapes(layers: int = LAYERS, *, head: bool = True) -> Shapes:
    """Keys and shapes of a tiny Llama under Hugging Face's names."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": (kv, HIDDEN),
            f"{at}self_attn.v_proj.weight": (kv, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{at}mlp.up_proj.weight": (FFN, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, FFN),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    if head:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """One safetensors file with a header and a hole for the data."""
    itemsize = {"BF16": 2, "F32": 4}[dtype]
    header, end = {}, 0
    for key, shape in shapes.items():
        nbytes = itemsize
        for length in shape:
            nbytes *= length
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_hf(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    files: int = 1,
    config: Mapping[str, object] | None = CONFIG,
    dtype: str = "BF16",
) -> Path:
    """A directory as ``save_pretrained`` leaves it; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    if files == 1:
        write_file(directory / "model.safetensors", shapes, dtype)
        return directory
    keys = list(shapes)
    weight_map: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = keys[number * len(keys) // files : (number + 1) * len(keys) // files]
        write_file(directory / name, {key: shapes[key] for key in part}, dtype)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@dataclass(frozen=True, slots=True)
class Misfit:
    """One way not to fit.

    Attributes:
        damage: Writes the checkpoint into a directory.
        label: The field of the coverage that tells.
        keys: What it lists: keys, or for problems words that one of them holds.
        to: The family asked for, or ``None``.
    """

    damage: Callable[[Path], object]
    label: str
    keys: tuple[str, ...]
    to: str | None = None


def _without(*keys: str) -> Callable[[Path], object]:
    return lambda path: write_hf(
        path, {key: shape for key, shape in llama_shapes().items() if key not in keys}
    )


def _with(**extra: tuple[int, ...]) -> Callable[[Path], object]:
    more = {key.replace("__", "."): shape for key, shape in extra.items()}
    return lambda path: write_hf(path, llama_shapes() | more)


def _truncated(path: Path) -> None:
    write_hf(path, llama_shapes(), files=3)
    victim = path / "model-00002-of-00003.safetensors"
    with victim.open("rb+") as file:
        file.truncate(victim.stat().st_size - 1000)


def _absent_file(path: Path) -> None:
    write_hf(path, llama_shapes(), files=3)
    (path / "model-00003-of-00003.safetensors").unlink()


def _absent_key(path: Path) -> None:
    write_hf(path, llama_shapes(), files=3)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.ghost"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))


def _orphan(path: Path) -> None:
    write_hf(path, llama_shapes(), files=3)
    write_file(path / "model-00004-of-00004.safetensors", {"left.over": (3,)})


def _duplicate(path: Path) -> None:
    write_hf(path, llama_shapes(), files=3)
    last = path / "model-00003-of-00003.safetensors"
    shapes = llama_shapes()
    part = list(shapes)[2 * len(shapes) // 3 :]
    write_file(last, {"model.embed_tokens.weight": (VOCAB, HIDDEN), **{k: shapes[k] for k in part}})


MISFITS: Mapping[str, Misfit] = {
    "missing": Misfit(
        _without("model.layers.3.self_attn.o_proj.weight", "model.norm.weight"),
        "missing",
        ("model.layers.3.self_attn.o_proj.weight", "model.norm.weight"),
    ),
    "missing-in-target": Misfit(
        _without("model.layers.3.self_attn.o_proj.weight"),
        "missing",
        ("layers.3.attention.wo.weight",),
        "lingua",
    ),
    "unknown": Misfit(
        _with(model__layers__2__self_attn__rotor__weight=(3,)),
        "unknown",
        ("model.layers.2.self_attn.rotor.weight",),
    ),
    "layer-beyond-config": Misfit(
        _with(model__layers__5__input_layernorm__weight=(HIDDEN,)),
        "unknown",
        ("model.layers.5.input_layernorm.weight",),
    ),
    "misshapen": Misfit(
        _with(model__layers__4__mlp__up_proj__weight=(FFN, HIDDEN + 1)),
        "misshapen",
        ("model.layers.4.mlp.up_proj.weight",),
    ),
    "refused": Misfit(
        lambda path: write_hf(
            path,
            llama_shapes(),
            config={**CONFIG, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        "refused",
        ("rope_scaling",),
        "lingua",
    ),
    "truncated": Misfit(_truncated, "problems", ("model-00002-of-00003.safetensors",)),
    "absent-file": Misfit(_absent_file, "problems", ("model-00003-of-00003.safetensors",)),
    "absent-key": Misfit(_absent_key, "problems", ("model.layers.9.ghost",)),
    "orphan": Misfit(_orphan, "problems", ("model-00004-of-00004.safetensors",)),
    "duplicate": Misfit(_duplicate, "problems", ("model.embed_tokens.weight",)),
}
