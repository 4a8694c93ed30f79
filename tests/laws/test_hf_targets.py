"""hf results are what ``save_pretrained`` would have written, and big torch files stay cheap."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dcpconv import convert
from dcpconv.core.catalog import Form
from support.checkpoints.stock import assert_same_bits, stock_load
from support.models.hf_models import save_hf, tiny
from support.models.layers import random_tokens

WAYS: list[Any] = [
    pytest.param("hf", "hf", id="hf"),
    pytest.param("torch", "hf", id="bare pth"),
    pytest.param("dcp", "hf", id="hf keys in a dcp"),
    pytest.param("dcp", "lingua", id="lingua dcp"),
    pytest.param("torch", "lingua", id="lingua consolidated"),
    pytest.param("torch", "meta", id="meta pth"),
]


def headers(directory: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Length and content of the header of every shard file."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found[file.name] = length, json.loads(data[8 : 8 + length])
    return found


def loaded(directory: Path) -> Any:
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(random_tokens(131)).logits)


@pytest.mark.parametrize(("form", "family"), WAYS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [None, 90_000], ids=["one file", "sharded"])
def test_from_pretrained_finds_every_key_and_the_same_logits(
    tmp_path: Path, form: Form, family: str, size: int | None, *, tied: bool
) -> None:
    model = tiny("llama", tie_word_embeddings=tied, rope_theta=490000.0)
    hf = save_hf(model, tmp_path / "hf")
    source = hf
    if (form, family) != ("hf", "hf"):
        source = tmp_path / ("source.pth" if form == "torch" else "source")
        convert(hf, source, form=form, to=family)

    convert(source, tmp_path / "out", form="hf", assets=hf, max_file_size=size)

    back = loaded(tmp_path / "out")
    assert torch.equal(logits(back), logits(model))
    assert_same_bits(back.state_dict(), model.state_dict())
    stored = stock_load(tmp_path / "out", "hf")
    assert ("lm_head.weight" in stored) is not tied
    for length, header in headers(tmp_path / "out").values():
        assert length % 8 == 0
        assert header["__metadata__"] == {"format": "pt"}
    assert (tmp_path / "out/model.safetensors.index.json").exists() is (size is not None)


@pytest.mark.parametrize("size", [40_000, 90_000, 200_000, 10**9])
def test_tensors_are_split_as_huggingface_hub_splits_them(tmp_path: Path, size: int) -> None:
    model = tiny("llama")
    hf = save_hf(model, tmp_path / "hf", max_shard_size=size)
    torch.save(model.state_dict(), tmp_path / "x.pth")  # has the order that save_pretrained sees

    convert(tmp_path / "x.pth", tmp_path / "out", form="hf", assets=hf, max_file_size=size)

    ours, theirs = headers(tmp_path / "out"), headers(hf)
    assert {name: set(header) for name, (_, header) in ours.items()} == {
        name: set(header) for name, (_, header) in theirs.items()
    }
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).exists() == (hf / index).exists()
    if (hf / index).exists():
        one, other = (json.loads((path / index).read_text()) for path in (tmp_path / "out", hf))
        assert one["weight_map"] == other["weight_map"]
        assert one["metadata"]["total_size"] == other["metadata"]["total_size"]


def test_a_head_that_differs_from_the_embedding_is_not_dropped(tmp_path: Path) -> None:
    """Says tied, but training has untied them: transformers must not be told that they are one."""
    model = tiny("llama", tie_word_embeddings=True)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    torch.save(state, tmp_path / "x.pth")
    hf = save_hf(model, tmp_path / "hf")

    report = convert(tmp_path / "x.pth", tmp_path / "out", form="hf", assets=hf)

    assert any("lm_head.weight" in note for note in report.notes)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert_same_bits(loaded(tmp_path / "out").state_dict(), state)


# ------------------------------------------------------------------------- beside the weights

TOKENIZER = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"model_max_length": 64}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"temperature": 0.5}',
}


def with_tokenizer(directory: Path) -> Path:
    for name, text in TOKENIZER.items():
        (directory / name).write_text(text)
    (directory / "README.md").write_text("for people")
    return directory


@pytest.mark.parametrize("origin", ["source", "assets"])
def test_config_and_tokenizer_are_carried_over(tmp_path: Path, origin: str) -> None:
    hf = with_tokenizer(save_hf(tiny("llama"), tmp_path / "hf"))
    source, assets = hf, None
    if origin == "assets":
        source, assets = tmp_path / "source.pth", hf
        convert(hf, source)

    report = convert(source, tmp_path / "out", form="hf", assets=assets)

    for name, text in TOKENIZER.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert (tmp_path / "out/config.json").read_text() == (hf / "config.json").read_text()
    assert set(report.side_files) == {*TOKENIZER, "README.md", "config.json"}


def test_a_lingua_step_without_assets_gets_a_config_from_its_params(tmp_path: Path) -> None:
    model = tiny("llama", rope_theta=490000.0, rms_norm_eps=1e-6)
    convert(save_hf(model, tmp_path / "hf"), tmp_path / "lingua", to="lingua")

    report = convert(tmp_path / "lingua", tmp_path / "out")

    assert "config.json" in report.side_files
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    # the fields of both generations of transformers
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 490000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(model))


def test_bare_weights_without_any_config_say_what_is_missing(tmp_path: Path) -> None:
    torch.save(tiny("llama").state_dict(), tmp_path / "x.pth")

    report = convert(tmp_path / "x.pth", tmp_path / "out", form="hf")

    assert not (tmp_path / "out/config.json").exists()
    assert any("config.json" in note and "--assets" in note for note in report.notes)


# --------------------------------------------------------------------- torch files above 4 GiB


def test_a_torch_file_above_4_gib_is_zip64_and_maps(tmp_path: Path) -> None:
    """A sparse source stays sparse, so this costs no disk and next to no time."""
    nbytes = 4_831_838_208  # 4.5 GiB
    header = {
        "big.weight": {"dtype": "U8", "shape": [9, nbytes // 9], "data_offsets": [0, nbytes]},
        "last": {"dtype": "U8", "shape": [8], "data_offsets": [nbytes, nbytes + 8]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = tmp_path / "model.safetensors"
    with source.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(nbytes - 3, 1)
        file.write(b"abc" + b"behind4G")
    if source.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no holes")

    report = convert(source, tmp_path / "big.pth")

    target = tmp_path / "big.pth"
    assert target.stat().st_size > nbytes
    assert target.stat().st_blocks * 512 < 64 << 20
    assert report.moved["holes"] > 4 << 30
    with zipfile.ZipFile(target) as archive:
        sizes = [record.file_size for record in archive.infolist()]
        offsets = [record.header_offset for record in archive.infolist()]
    assert max(sizes) == nbytes
    assert max(offsets) > 1 << 32
    state = torch.load(target, weights_only=True, mmap=True)
    assert bytes(state["big.weight"][-1, -3:].tolist()) == b"abc"
    assert bytes(state["last"].tolist()) == b"behind4G"
    assert int(state["big.weight"][0, :4096].sum()) == 0
