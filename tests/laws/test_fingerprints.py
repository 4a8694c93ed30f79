"""The fingerprint against its written definition, computed with torch; and that nothing but the
weights matters to it: no form, naming, sharding, chunk or file size."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from dcpconv import check, convert, fingerprint
from dcpconv.cli.app import app
from dcpconv.core.catalog import Form
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import DcpconvError
from dcpconv.families.keymaps import keymaps
from dcpconv.plan.canonical import LAYOUTS, layout_of
from support.checkpoints.families import hf_tensors
from support.models.hf_models import MODEL_TYPES, save_hf, tiny

CHUNK = 1 << 20

LLAMA = {
    "model.embed_tokens.weight": "embed",
    "lm_head.weight": "head",
    "model.norm.weight": "final_norm",
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
"""Canonical names of transformers' keys, whose axes are the canonical ones."""


def named(key: str) -> str:
    if not key.startswith("model.layers."):
        return LLAMA[key]
    _, _, layer, rest = key.split(".", 3)
    return f"layer.{layer}.{LLAMA[rest]}"


def digest(tensor: Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    chunks = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
    return str(blake3(b"".join(blake3(chunk).digest() for chunk in chunks)).hexdigest())


def defined(tensors: dict[str, Tensor]) -> str:
    """What docs/fingerprints.md says, word by word."""
    lines = []
    for name, tensor in sorted(tensors.items()):
        label = BY_NAME[str(tensor.dtype).removeprefix("torch.")].label
        shape = "x".join(map(str, tensor.shape))
        lines.append(f"{json.dumps(name)} {label} {shape} {digest(tensor)}\n")
    return f"dcpconv1:{blake3(''.join(lines).encode()).hexdigest()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [131, 4099], ids=["one-chunk", "chunks"])
def test_the_fingerprint_is_what_its_definition_says(
    tmp_path: Path, dtype: torch.dtype, vocab: int
) -> None:
    model = tiny("llama", dtype=dtype, vocab_size=vocab)
    source = save_hf(model, tmp_path / "hf", max_shard_size="300KB")
    tensors = {named(key): value for key, value in hf_tensors(source).items()}

    found = fingerprint(source)

    assert found.digest == defined(tensors)
    assert {tensor.name: tensor.digest.hex() for tensor in found.tensors} == {
        name: digest(tensor) for name, tensor in tensors.items()
    }


def test_two_fingerprints_that_never_change(tmp_path: Path) -> None:
    tensors = {
        "embed.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "a\n": torch.zeros(0, 2, dtype=torch.int64),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "large": torch.arange(300_000, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path / "model.safetensors").digest == GOLDEN_STORED

    save_llama(tmp_path / "llama")
    assert fingerprint(tmp_path / "llama").digest == GOLDEN_LLAMA


GOLDEN_STORED = "dcpconv1-stored:ddb3ca29deb72d0f7c1890cbd6d172256df332e72c84a4607ffec1aec2c66ef1"
GOLDEN_LLAMA = "dcpconv1:a8b1759016623becf7aaee76dd2ac05c504165bfdd06295bbe1ce72a59b6b485"


def save_llama(directory: Path) -> None:
    """Values that no generator of random numbers decides."""
    model = tiny("llama", dtype=torch.bfloat16, num_hidden_layers=1)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            counted = torch.arange(parameter.numel()).reshape(parameter.shape)
            parameter.copy_((counted * (number + 3)) % 251 / 128)
    save_hf(model, directory)


NAMINGS = [
    *((model_type, "hf-memory") for model_type in MODEL_TYPES),
    *(("llama", to) for to in ("lingua", "meta", "torchtitan-llama3", "torchtitan-llama3-2025")),
    *(("qwen3", "torchtitan-qwen3"), ("qwen3_moe", "torchtitan-qwen3"), ("phi3", "hf-llama")),
    *(("glm", "chatglm3"), ("deepseek_v3", "torchtitan-deepseek_v3")),
    *(("llama4_text", "meta-llama4"), ("llama4_text", "meta-memory-llama4")),
    *(("tied llama", "minimind3"), ("tied qwen3", "minimind4"), ("tied qwen3_moe", "minimind4")),
]


@pytest.mark.parametrize(("model_type", "to"), NAMINGS)
def test_form_and_naming_do_not_matter(tmp_path: Path, model_type: str, to: str) -> None:
    how, _, name = model_type.rpartition(" ")
    tied = {"tie_word_embeddings": True} if how else {}
    model = tiny(name, dtype=torch.bfloat16, **tied)
    source = save_hf(model, tmp_path / "hf", max_shard_size="90KB")
    expected = fingerprint(source).digest
    assert expected.startswith("dcpconv1:")
    forms: tuple[Form, ...] = ("hf", "dcp")
    for form in forms:
        target = tmp_path / f"as-{form}"
        chunks = 3 if form == "dcp" else 1
        report = convert(source, target, form=form, to=to, chunks=chunks, fingerprint=True)
        assert report.fingerprint == expected
        assert report.fingerprint_nbytes == report.moved.get("reflinked", 0)
        assets = source if to.startswith("torchtitan") else None  # which writes no parameter file
        assert fingerprint(target, assets=assets).digest == expected


def test_a_file_without_its_config_has_the_same_fingerprint(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "hf.pth", form="torch", to="hf")
    convert(source, tmp_path / "lingua.pth", form="torch", to="lingua")

    expected = fingerprint(source).digest

    assert fingerprint(tmp_path / "hf.pth").digest == expected
    with pytest.raises(DcpconvError, match=r"hint .* --assets DIR names") as told:
        fingerprint(tmp_path / "lingua.pth")
    assert told.value.exit_code == 2
    assert fingerprint(tmp_path / "lingua.pth", assets=source).digest == expected
    assert fingerprint(tmp_path / "lingua.pth", spec="heads=6,kv_heads=2").digest == expected


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tie_counts_once(tmp_path: Path, *, tied: bool) -> None:
    source = save_hf(tiny("llama", tie_word_embeddings=tied), tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="lingua")
    names = {tensor.name for tensor in fingerprint(source).tensors}

    assert ("head" in names) is not tied
    assert fingerprint(tmp_path / "dcp").digest == fingerprint(source).digest


def test_a_second_name_that_holds_something_else_is_seen(tmp_path: Path) -> None:
    source = save_hf(tiny("llama", tie_word_embeddings=True), tmp_path / "hf")
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    expected = fingerprint(source).digest

    head = tensors["model.embed_tokens.weight"].clone()
    head[7, 5] += 1
    save_file({**tensors, "lm_head.weight": head}, file)
    found = fingerprint(source)

    assert found.digest != expected
    assert any("differ" in note for note in found.notes)


@pytest.mark.parametrize("name", ["embed", "layer.1.q", "layer.2.down", "final_norm"])
def test_one_element_matters_and_its_tensor_is_named(tmp_path: Path, name: str) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    before = {tensor.name: tensor for tensor in fingerprint(source).tensors}
    tensors = load_file(source / "model.safetensors")
    key = next(key for key in tensors if named(key) == name)
    flat = tensors[key].view(torch.int32).flatten()
    flat[len(flat) // 2] ^= 1
    save_file(tensors, source / "model.safetensors")

    after = {tensor.name: tensor for tensor in fingerprint(source).tensors}

    assert [name for name in before if before[name] != after[name]] == [name]


def test_the_type_of_elements_matters(tmp_path: Path) -> None:
    source = save_hf(tiny("llama", dtype=torch.bfloat16), tmp_path / "hf")
    convert(source, tmp_path / "wide", form="hf", dtype="fp32")
    assert fingerprint(tmp_path / "wide").digest != fingerprint(source).digest


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_threads_and_files_do_not_matter_to_an_unknown_model(tmp_path: Path, jobs: int) -> None:
    torch.manual_seed(3)
    tensors = {
        "encoder.block.0.w": torch.randn(3000, 700),
        "encoder.block.0.b": torch.randn(700).half(),
        "steps": torch.tensor(17),
        "none": torch.zeros(3, 0),
    }
    torch.save(tensors, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "dcp", form="dcp", chunks=5)
    convert(tmp_path / "a.pth", tmp_path / "hf", form="hf", max_file_size=4_000_000)

    found = fingerprint(tmp_path / "a.pth", jobs=jobs)

    assert found.digest.startswith("dcpconv1-stored:")
    assert {t.name: t.digest.hex() for t in found.tensors} == {
        key: digest(tensor) for key, tensor in tensors.items()
    }
    assert fingerprint(tmp_path / "dcp", jobs=jobs).digest == found.digest
    assert fingerprint(tmp_path / "hf", jobs=jobs).digest == found.digest


def test_keys_without_a_slot_count_under_their_names_and_computed_ones_do_not(
    tmp_path: Path,
) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    plain = fingerprint(source).digest
    file = source / "model.safetensors"
    tensors = load_file(file)

    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    found = fingerprint(source)
    assert found.digest == plain
    assert [key for key, _ in found.left_out] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]

    save_file({**tensors, "value_head.weight": torch.ones(8)}, file)
    found = fingerprint(source)
    assert found.digest != plain
    assert "stored/value_head.weight" in {tensor.name for tensor in found.tensors}


def test_a_selection_bias_of_zeros_does_nothing_and_does_not_count(tmp_path: Path) -> None:
    """torchtitan always stores one, other namings only where the model has one."""
    source = save_hf(tiny("qwen3_moe", dtype=torch.bfloat16), tmp_path / "hf")
    convert(source, tmp_path / "titan", form="dcp", to="torchtitan-qwen3")
    stored = [key for key in check(tmp_path / "titan").targets if "expert_bias" in key.key]

    assert stored
    assert fingerprint(tmp_path / "titan").digest == fingerprint(source).digest


def test_every_slot_that_namings_lay_out_differently_has_a_canonical_layout() -> None:
    found: dict[str, set[Any]] = {}
    for table in keymaps().values():
        for row in table.rows:
            for term, slot in enumerate(row.slots):
                found.setdefault(slot, set()).add(layout_of(slot, row, term))
    ambiguous = {slot for slot, layouts in found.items() if len(layouts) > 1}
    assert not ambiguous
    axes = {slot: {layout.axes() for _, layout in layouts} for slot, layouts in found.items()}
    assert all(len(one) == 1 for one in axes.values())
    assert set(LAYOUTS) <= set(found)


def test_the_page_lists_the_canonical_layouts() -> None:
    page = (Path(__file__).parents[2] / "docs/fingerprints.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (`.+`) \|$", page, re.MULTILINE)
    told = {slot.strip("`"): axes for axes, slots in rows for slot in slots.split(", ")}
    assert {slot: axes for slot, axes in told.items() if slot in LAYOUTS} == dict(LAYOUTS)


def test_the_source_may_not_change_while_it_is_read(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    seen: list[int] = []
    once = iter([True])  # threads call, and only the first of them may find it

    def rewrite(nbytes: int) -> None:
        if next(once, False):
            file = source / "model.safetensors"
            copy = tmp_path / "copy"
            copy.write_bytes(file.read_bytes())
            copy.replace(file)
        seen.append(nbytes)

    with pytest.raises(DcpconvError, match="changed while it was being read"):
        fingerprint(source, progress=rewrite)
    assert sum(seen) == fingerprint(other).nbytes


def run(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["fingerprint", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_the_fingerprint_alone(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    expected = fingerprint(source)
    assert run(source) == (0, expected.digest + "\n", "")

    code, text, _ = run(source, "--json", "-o", tmp_path / "manifest.json")
    assert code == 0
    assert json.loads(text) == expected.to_json()
    assert (tmp_path / "manifest.json").read_text() == text
    stored = run(source, "--stored")[1]
    assert stored.startswith("dcpconv1-stored:")
    assert stored.strip() == fingerprint(source, stored=True).digest


def test_keys_without_weights_have_none(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    keys = tmp_path / "keys.json"
    CliRunner().invoke(app, ["keys", str(source), "-o", str(keys)])
    code, text, complaint = run(keys)
    assert (code, text) == (2, "")
    assert "keys here and no weights" in complaint
    assert run(tmp_path / "none")[0] == 2
