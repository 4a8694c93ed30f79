"""``convert --fingerprint``: what is on disk afterwards, read once, with its manifest beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dcpconv import check, convert, fingerprint
from dcpconv.cli.app import app
from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError
from dcpconv.plan.fingerprints import MANIFEST, read_manifest
from support.models.hf_models import save_hf, tiny


@pytest.mark.parametrize("to", ["hf", "lingua", "stored"])
@pytest.mark.parametrize("form", ["hf", "dcp", "torch"])
def test_it_is_the_fingerprint_of_the_result(tmp_path: Path, form: Form, to: str) -> None:
    source = save_hf(tiny("llama", tie_word_embeddings=True), tmp_path / "hf")
    expected = fingerprint(source)
    target = tmp_path / ("out.pth" if form == "torch" else "out")

    report = convert(source, target, form=form, to=to, fingerprint=True)

    assert report.fingerprint == expected.digest
    assert report.fingerprint_nbytes == expected.nbytes
    assert report.to_json()["fingerprint"] == expected.digest
    if form != "torch":
        assert read_manifest(target / MANIFEST).digest == expected.digest
        assert check(target, against=target / MANIFEST, data=True)


def test_a_cast_has_the_fingerprint_of_what_was_written(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    report = convert(source, tmp_path / "out", form="hf", dtype="bf16", fingerprint=True)
    assert report.fingerprint == fingerprint(tmp_path / "out").digest
    assert report.fingerprint != fingerprint(source).digest


def test_the_manifest_of_a_source_is_not_carried_to_its_result(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "a", form="hf", fingerprint=True)
    convert(tmp_path / "a", tmp_path / "b", form="hf", dtype="bf16")
    assert (tmp_path / "a" / MANIFEST).exists()
    assert not (tmp_path / "b" / MANIFEST).exists()


def test_an_unknown_model_has_one_too(tmp_path: Path) -> None:
    torch.save({"model": {"a.w": torch.ones(5)}, "step": 3}, tmp_path / "x.pth")
    report = convert(tmp_path / "x.pth", tmp_path / "out", form="dcp", fingerprint=True)
    assert report.fingerprint == fingerprint(tmp_path / "x.pth").digest
    assert report.fingerprint.startswith("dcpconv1-stored:")


def test_torchs_engine_takes_none_and_a_dry_run_reads_nothing(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    with pytest.raises(DcpconvError, match="takes no fingerprint"):
        convert(source, tmp_path / "out", form="dcp", engine="torch", fingerprint=True)
    report = convert(source, tmp_path / "out", form="dcp", dry_run=True, fingerprint=True)
    assert not report.fingerprint
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_read(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "o"), "--fingerprint"])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("digest")]
    assert fingerprint(source).digest in line
    assert "of the result read for it" in line
