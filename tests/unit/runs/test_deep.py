"""``runs verify --deep``: contents against the fingerprints that were written at save time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dcpconv import CheckpointWriter, fingerprint, save_weights
from dcpconv.cli.app import app
from dcpconv.core.catalog import Form
from dcpconv.engine.manifests import MANIFEST, manifest_beside
from dcpconv.plan.fingerprints import read_manifest
from dcpconv.runs import verify_checkpoints
from support.models.hf_models import tiny
from support.runs.run_dirs import example
from support.versions import save_alone


def run_of(directory: Path) -> list[Path]:
    """Steps of a run whose weights can be opened."""
    example(directory)
    return [
        checked.step.weights
        for checked in verify_checkpoints(directory)
        if checked and checked.step.form is not None
    ]


def test_a_step_that_rotted_is_told_from_one_that_did_not(tmp_path: Path) -> None:
    weights = run_of(tmp_path / "run")
    assert len(weights) >= 2
    for path in weights:
        fingerprint(path).write(manifest_beside(path))
    before = {c.step.weights: c for c in verify_checkpoints(tmp_path / "run", deep=True)}
    assert all(before[path] and not before[path].notes for path in weights)
    file = min(weights[0].glob("*.safetensors"))
    tensors = load_file(file)
    key = min(tensors)
    tensors[key] = tensors[key] + torch.ones_like(tensors[key])
    save_file(tensors, file, {"format": "pt"})

    found = {c.step.weights: c for c in verify_checkpoints(tmp_path / "run", deep=True)}

    assert [problem for problem in found[weights[0]].problems if key in problem]
    assert all(not found[path].problems for path in weights[1:])
    assert all(c for c in verify_checkpoints(tmp_path / "run") if c.step.weights == weights[0])


def test_a_step_without_a_fingerprint_is_noted(tmp_path: Path) -> None:
    run_of(tmp_path / "run")
    done = CliRunner().invoke(app, ["runs", "verify", str(tmp_path / "run"), "--deep", "--json"])
    noted = [step for step in json.loads(done.stdout) if step.get("notes")]
    assert noted
    assert all("contents were not compared" in step["notes"][0] for step in noted)
    plain = CliRunner().invoke(app, ["runs", "verify", str(tmp_path / "run")])
    assert plain.exit_code == done.exit_code
    assert "contents" not in plain.stdout


@pytest.mark.parametrize("form", ["hf", "dcp"])
def test_saving_writes_what_a_deep_look_compares_with(tmp_path: Path, form: Form) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    for step in (100, 200):
        target = tmp_path / "run" / f"step-{step}"
        report = save_weights(model, target, form=form, fingerprint=True)
        assert report.fingerprint == fingerprint(target).digest
        assert read_manifest(target / MANIFEST).digest == report.fingerprint
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1)

    def problems() -> list[tuple[str, ...]]:
        found = list(verify_checkpoints(tmp_path / "run", deep=True))
        assert not [note for step in found for note in step.notes]
        return [step.problems for step in found]

    assert problems() == [(), ()]
    rotten = max((tmp_path / "run/step-200").glob("*.[sd]*"), key=lambda f: f.stat().st_size)
    data = bytearray(rotten.read_bytes())
    data[-3000] ^= 1
    rotten.write_bytes(data)
    good, bad = problems()
    assert not good
    assert len(bad) == 1


def test_one_file_has_its_manifest_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    report = save_weights(tiny("llama"), target, form="torch", fingerprint=True)
    manifest = tmp_path / f"model.pth.{MANIFEST}"
    assert manifest == manifest_beside(target)
    assert read_manifest(manifest).digest == report.fingerprint == fingerprint(target).digest


def test_what_torch_saves_through_the_writer_has_its_manifest(tmp_path: Path) -> None:
    state = tiny("llama").state_dict()
    writer = CheckpointWriter(tmp_path / "out", form="dcp", fingerprint=True)
    save_alone(state, storage_writer=writer)
    assert writer.report is not None
    assert writer.report.fingerprint == fingerprint(tmp_path / "out").digest
    assert writer.report.fingerprint_nbytes == 0
    assert (tmp_path / "out" / MANIFEST).is_file()
