"""``check --against MANIFEST --data``: what rotted is named, whatever form and naming it is in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dcpconv import check, convert, fingerprint
from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.plan.coverage import FAULTS
from dcpconv.plan.fingerprints import read_manifest
from support.models.hf_models import save_hf, tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_hf(tiny("llama"), tmp_path / "hf")


@pytest.fixture
def manifest(tmp_path: Path, source: Path) -> Path:
    path = tmp_path / "llama.json"
    fingerprint(source).write(path)
    return path


def flip(source: Path, key: str) -> None:
    """Changes one bit of a tensor."""
    tensors = load_file(source / "model.safetensors")
    tensors[key].view(torch.int32).flatten()[5] ^= 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def faults(source: Path, manifest: Path, *, data: bool = True) -> dict[str, list[str]]:
    coverage = check(source, against=manifest, data=data)
    found = {label: [fault.key for fault in getattr(coverage, label)] for label in FAULTS}
    assert bool(coverage) is not any(found.values())
    return {label: keys for label, keys in found.items() if keys}


def test_a_manifest_is_read_as_it_was_written(source: Path, manifest: Path) -> None:
    written, read = fingerprint(source), read_manifest(manifest)
    assert (read.digest, read.tensors, read.family) == (
        written.digest,
        written.tensors,
        written.family,
    )
    assert json.loads(manifest.read_text()) == written.to_json()
    assert len(manifest.read_text().splitlines()) > len(written.tensors)


def test_the_same_weights_in_another_form_and_naming_fit(
    tmp_path: Path, source: Path, manifest: Path
) -> None:
    convert(source, tmp_path / "out", form="dcp", to="lingua", chunks=2)
    assert not faults(tmp_path / "out", manifest)
    assert not faults(source, manifest)


def test_what_rotted_is_named_by_its_key_in_that_checkpoint(
    tmp_path: Path, source: Path, manifest: Path
) -> None:
    key = "model.layers.2.mlp.down_proj.weight"
    flip(source, key)
    convert(source, tmp_path / "out", form="dcp", to="lingua")

    assert faults(source, manifest) == {"changed": [key]}
    assert faults(source, manifest, data=False) == {}
    assert faults(tmp_path / "out", manifest) == {
        "changed": ["model.layers.2.feed_forward.w2.weight"]
    }


def test_headers_tell_what_is_lost_new_or_of_another_shape(source: Path, manifest: Path) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(96, 95)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file({**tensors, "value.weight": torch.ones(3)}, file, {"format": "pt"})
    for data in (False, True):
        found = faults(source, manifest, data=data)
        assert found == {
            "missing": ["layer.1.o"],
            "misshapen": ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"],
            "unknown": ["value.weight"],
        }


def test_an_unknown_model_is_compared_by_its_keys(tmp_path: Path) -> None:
    torch.save({"a.w": torch.ones(5), "b.w": torch.ones(4)}, tmp_path / "x.pth")
    fingerprint(tmp_path / "x.pth").write(tmp_path / "x.json")
    torch.save({"a.w": torch.ones(5), "b.w": torch.zeros(4)}, tmp_path / "y.pth")
    assert faults(tmp_path / "x.pth", tmp_path / "x.json") == {}
    assert faults(tmp_path / "y.pth", tmp_path / "x.json") == {"changed": ["b.w"]}


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"shape": [96]', '"shape": [97]', "do not make up its fingerprint"),
        ("dcpconv1:", "dcpconv9:", "another version"),
        ('"digest": "', '"digest": "zz', "does not say what a tensor is"),
        ('"shape": [96]', '"shape": [-1]', "does not say what a tensor is"),
        ('"names": "slots"', '"names": "moons"', "another version"),
        ('"tensors": {', '"tensors": 3, "x": {', "no manifest"),
    ],
)
def test_an_edited_manifest_is_an_error(
    source: Path, manifest: Path, old: str, new: str, complaint: str
) -> None:
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    with pytest.raises(FormatError, match=complaint):
        check(source, against=manifest)


def test_contents_need_a_manifest(source: Path) -> None:
    for against in (None, source):
        with pytest.raises(DcpconvError, match="only a manifest"):
            check(source, against=against, data=True)


@pytest.mark.parametrize("report", ["text", "json", "junit", "github"])
def test_every_report_names_what_changed(source: Path, manifest: Path, report: str) -> None:
    key = "model.layers.2.mlp.down_proj.weight"
    words = ["check", str(source), "--against", str(manifest), "--data", "--report", report]
    assert CliRunner().invoke(app, words).exit_code == 0
    flip(source, key)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert key in done.stdout
    assert "changed" in done.stdout
    if report == "text":
        row = next(line.split() for line in done.stdout.splitlines() if line.startswith("2  "))
        assert row.count("*") == 1
        assert row.count(".") == 8


def test_a_cut_file_says_no_and_is_not_read(source: Path, manifest: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    coverage = check(source, against=manifest, data=True)
    assert not coverage
    assert coverage.problems
