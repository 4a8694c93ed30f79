"""A second set of weights beside the chosen one is told, whichever command meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpconv import check, convert
from support.models.hf_models import save_hf, tiny


def other(directory: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        save_file({"w": torch.zeros(2)}, directory / name, metadata={"format": "pt"})
    else:
        torch.save({"w": torch.zeros(2)}, directory / name)


@pytest.mark.parametrize(
    "name",
    [
        "shard-00001-model-00001-of-00001.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "model.fp16.safetensors",
    ],
)
def test_it_is_a_note_and_not_read(tmp_path: Path, name: str) -> None:
    source = save_hf(tiny("llama"), tmp_path / "in")
    expected = load_file(source / "model.safetensors")
    other(source, name)
    wanted = f"the weights were read from model.safetensors; beside them lie {name}"
    for form, to in (("hf", None), ("dcp", None), ("dcp", "lingua"), ("torch", None)):
        out = tmp_path / f"{form}-{to}{'.pth' if form == 'torch' else ''}"
        report = convert(source, out, form=form, to=to)  # type: ignore[arg-type]
        assert wanted in report.notes, (form, to)
    found = load_file(tmp_path / "hf-None" / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not (tmp_path / "hf-None" / name).exists()
    judged = check(source)
    assert judged
    assert wanted in judged.notes


def test_nothing_is_said_of_files_that_belong_together(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "in")
    convert(source, tmp_path / "dcp", form="dcp", chunks=2)
    convert(tmp_path / "dcp", tmp_path / "hf", form="hf", max_file_size=50_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    for place in ("in", "dcp", "hf"):
        assert not any("beside them" in note for note in check(tmp_path / place).notes)


def test_an_adapter_is_told_as_what_it_is(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "in")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({key: torch.zeros(2, 96)}, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    notes = convert(source, tmp_path / "out", form="dcp").notes
    assert not any("beside them" in note for note in notes)
    assert any("is an adapter and was left out" in note for note in notes)
