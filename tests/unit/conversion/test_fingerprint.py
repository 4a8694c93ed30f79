"""``convert --fingerprint``: of what is on disk afterwards, taken on the way there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dcpconv import check, convert, fingerprint
from dcpconv.cli.app import app
from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError
from dcpconv.engine.manifests import MANIFEST, manifest_beside
from dcpconv.plan.fingerprints import read_manifest
from support.models.hf_models import save_hf, tiny

FORMS: tuple[Form, ...] = ("hf", "dcp", "torch")


@pytest.mark.parametrize("to", ["hf", "lingua", "stored"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_fingerprint_of_the_result(tmp_path: Path, form: Form, to: str) -> None:
    source = save_hf(tiny("llama", tie_word_embeddings=True), tmp_path / "hf")
    expected = fingerprint(source)
    target = tmp_path / ("out.pth" if form == "torch" else "out")

    report = convert(source, target, form=form, to=to, fingerprint=True)

    assert report.fingerprint == expected.digest
    assert report.fingerprint_nbytes == report.moved.get("reflinked", 0)
    assert report.to_json()["fingerprint"] == expected.digest
    manifest = manifest_beside(target)
    assert read_manifest(manifest).digest == expected.digest
    assert check(target, against=manifest, data=True, assets=source)
    names = {path.name for path in tmp_path.iterdir()} - {"hf"}
    assert names == ({"out.pth", manifest.name} if form == "torch" else {"out"})


def test_the_manifest_of_a_file_is_exchanged_with_it(tmp_path: Path) -> None:
    source, target = save_hf(tiny("llama"), tmp_path / "hf"), tmp_path / "out.pth"
    manifest = tmp_path / f"out.pth.{MANIFEST}"
    manifest.write_text("of a file that is not there\n")
    convert(source, target)
    assert manifest.read_text() == "of a file that is not there\n"
    for dtype in ("bf16", "fp32"):
        report = convert(source, target, dtype=dtype, fingerprint=True, overwrite=True)
        assert read_manifest(manifest).digest == report.fingerprint
    convert(source, target, dtype="fp16", overwrite=True)
    assert not manifest.exists()


@pytest.mark.parametrize("step", ["first", "second"])
def test_no_crash_leaves_a_manifest_of_other_weights(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = save_hf(tiny("llama"), tmp_path / "hf"), tmp_path / "out.pth"
    old = convert(source, target, fingerprint=True).fingerprint
    left = {"first": 0, "second": 1}[step]
    replace = Path.replace

    def crash(path: Path, other: Path) -> Path:
        nonlocal left
        if other.parent == tmp_path:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return replace(path, other)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, dtype="bf16", fingerprint=True, overwrite=True)
    assert (fingerprint(target).digest == old) is (step == "first")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out.pth"}


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
    assert line.endswith(("taken while it was written", " read for it"))


def bytes_read() -> int:
    """By this process so far, in any way: the kernel's own copies count, reflinks do not."""
    counted = Path("/proc/self/io").read_text(encoding="ascii")
    return int(counted.partition("rchar: ")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no reads here")
@pytest.mark.parametrize(
    "options", [{"to": "stored"}, {"to": "lingua"}, {"dtype": "bf16"}], ids=str
)
def test_every_byte_is_read_once(tmp_path: Path, options: dict[str, str]) -> None:
    source = save_hf(tiny("llama", vocab_size=40_009), tmp_path / "hf")
    weights = (source / "model.safetensors").stat().st_size
    convert(source, tmp_path / "warm", form="dcp", fingerprint=True, **options)  # type: ignore[arg-type]

    before = bytes_read()
    report = convert(source, tmp_path / "out", form="dcp", fingerprint=True, **options)  # type: ignore[arg-type]
    read = bytes_read() - before

    assert report.fingerprint == fingerprint(tmp_path / "out").digest
    assert weights <= read < 1.1 * weights


def test_a_file_whose_chunks_pass_in_another_order_has_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that the target stores turned round: there is no room to put all of them together."""
    source = save_hf(tiny("gpt_oss", dtype=torch.bfloat16), tmp_path / "hf")
    monkeypatch.setattr("dcpconv.engine.passing.ROOM", 0)
    report = convert(source, tmp_path / "out", form="dcp", chunks=3, fingerprint=True)
    assert report.fingerprint == fingerprint(source).digest
    assert report.fingerprint_nbytes > 0
    assert read_manifest(tmp_path / "out" / MANIFEST).digest == report.fingerprint


def test_files_that_share_a_tensor_are_read_afterwards(tmp_path: Path) -> None:
    source = save_hf(tiny("llama", vocab_size=132), tmp_path / "hf")
    options = {"form": "torch", "to": "meta", "model_parallel": 2, "fingerprint": True}
    report = convert(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert report.fingerprint == fingerprint(source).digest
    assert report.fingerprint_nbytes >= fingerprint(source).nbytes


def test_a_tie_of_two_values_is_two_tensors(tmp_path: Path) -> None:
    source = save_hf(tiny("llama", tie_word_embeddings=True), tmp_path / "hf")
    file = source / "model.safetensors"
    tensors = load_file(file)
    equal = tensors["model.embed_tokens.weight"].clone()
    for head in (equal, equal + 1):
        save_file({**tensors, "lm_head.weight": head}, file)
        expected = fingerprint(source)
        assert len(expected.tensors) == (29 if head is equal else 30)
        for form in FORMS:
            target = tmp_path / ("out.pth" if form == "torch" else f"out-{form}")
            for to in ("hf", "stored", "lingua"):
                report = convert(source, target, form=form, to=to, fingerprint=True, overwrite=True)
                assert report.fingerprint == expected.digest
