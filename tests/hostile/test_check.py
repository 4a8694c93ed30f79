"""check on damaged checkpoints of every form, and the promise that it exits with 0, 1 or 2."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import check
from dcpconv.checking.reports import KINDS
from support.checkpoints.check_cases import CONFIG, MISFITS, llama_shapes, write_file, write_hf


def dcpconv(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dcpconv", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


# DCP: the index space, not only the keys.


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A DCP directory that torch wrote, one tensor of it as two chunks in files of their own."""
    path = tmp_path / "checkpoint"
    save({"a": torch.arange(24.0).reshape(12, 2), "b": torch.ones(3)}, checkpoint_id=path)
    save({"x": torch.zeros(6, 2)}, checkpoint_id=tmp_path / "part")
    part = (tmp_path / "part" / "__0_0.distcp").read_bytes()
    metadata = read_metadata(path)
    whole = next(index for index in metadata.storage_data if index.fqn == "a")
    item = metadata.storage_data.pop(whole)
    chunks = [ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([6, 2])) for row in (0, 6)]
    tensor = metadata.state_dict_metadata["a"]
    metadata.state_dict_metadata["a"] = replace(tensor, chunks=chunks)
    for number, chunk in enumerate(chunks):
        name = f"part_{number}.distcp"
        (path / name).write_bytes(part)
        index = MetadataIndex("a", chunk.offsets, number)
        metadata.storage_data[index] = replace(item, relative_path=name, offset=0, length=len(part))
    write_metadata(path, metadata)
    return path


def write_metadata(path: Path, metadata: Any) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def read_metadata(path: Path) -> Any:
    return pickle.loads((path / ".metadata").read_bytes())


def _move_second_chunk(path: Path, row: int) -> None:
    """Pretend that the second chunk begins elsewhere, which leaves a gap or an overlap."""
    metadata = read_metadata(path)
    tensor = metadata.state_dict_metadata["a"]
    first, second = tensor.chunks
    old = MetadataIndex("a", second.offsets, 1)
    offsets = torch.Size([row, 0])
    moved = ChunkStorageMetadata(offsets, second.sizes)
    metadata.state_dict_metadata["a"] = replace(
        tensor, chunks=[first, moved], size=torch.Size([12 if row < 6 else row + 6, 2])
    )
    metadata.storage_data[MetadataIndex("a", offsets, 1)] = metadata.storage_data.pop(old)
    write_metadata(path, metadata)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gap": (lambda path: _move_second_chunk(path, 8), "a: nothing is stored for [6:8, 0:2]"),
    "overlap": (lambda path: _move_second_chunk(path, 4), "both hold [4:6, 0:2]"),
    "lost-file": (lambda path: (path / "part_1.distcp").unlink(), "part_1.distcp: file is missing"),
    "short-file": (
        lambda path: os.truncate(path / "part_1.distcp", 100),
        "part_1.distcp: 100 bytes, but needs",
    ),
}


def test_the_undamaged_directory_fits(stored: Path) -> None:
    assert check(stored)


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_in_the_index_space_is_told_in_every_report(
    kind: str, damage: Callable[[Path], object], expected: str, stored: Path
) -> None:
    damage(stored)
    run = dcpconv("check", stored, "--report", kind)
    assert run.returncode == 1, run.stderr
    assert expected in run.stdout


def test_all_damage_is_told_in_one_run(stored: Path) -> None:
    _move_second_chunk(stored, 8)
    os.truncate(stored / "part_0.distcp", 100)
    coverage = check(stored)
    assert [DAMAGE["gap"][1] in p for p in coverage.problems].count(True) == 1
    assert ["part_0.distcp" in p for p in coverage.problems].count(True) == 1
    assert {target.key for target in coverage.targets} >= {"b"}


# Exit codes: an answer, or that there is none.


def _garbage(path: Path) -> Path:
    path.mkdir()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{")
    return path


def _deep(path: Path) -> Path:
    path.mkdir()
    text = b"[" * 200_000
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def _bad_index(path: Path) -> Path:
    write_hf(path, llama_shapes(), files=3)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    return path


def _escaping_index(path: Path) -> Path:
    write_hf(path, llama_shapes(), files=3)
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _without_tensors(path: Path) -> Path:
    return write_hf(path, {}, config=None)


def _many_absent(path: Path) -> Path:
    path.mkdir()
    write_file(path / "model-00001-of-99999.safetensors", llama_shapes())
    return path


SOURCES: dict[str, tuple[Callable[[Path], object], int]] = {
    "whole": (lambda path: write_hf(path, llama_shapes()), 0),
    "missing": (MISFITS["missing"].damage, 1),
    "truncated": (MISFITS["truncated"].damage, 1),
    "garbage": (_garbage, 1),
    "nested-header": (_deep, 1),
    "bad-index": (_bad_index, 2),
    "escaping-index": (_escaping_index, 2),
    "no-tensors": (_without_tensors, 1),
    "many-absent": (_many_absent, 1),
    "empty-directory": (lambda path: path.mkdir(), 2),
    "absent": (lambda _: None, 2),
    "text-file": (lambda path: path.write_text("hello"), 2),
    "truncated-torch-file": (lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 60), 2),
}


@pytest.mark.parametrize(("write", "expected"), SOURCES.values(), ids=SOURCES)
def test_the_exit_code_is_the_answer(
    write: Callable[[Path], object], expected: int, tmp_path: Path
) -> None:
    write(tmp_path / "source")
    run = dcpconv("check", tmp_path / "source")
    assert run.returncode == expected, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert len(run.stdout) < 20_000
    assert bool(run.stderr) == (expected == 2)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--bogus",), id="no-such-option"),
        pytest.param((), id="no-source"),
        pytest.param(("SRC", "--report", "pdf"), id="no-such-report"),
        pytest.param(("SRC", "--to", "nonsense"), id="no-such-family"),
        pytest.param(("SRC", "-o", "/no/such/directory/report"), id="nowhere-to-write"),
        pytest.param(("SRC", "--keymap", "/no/such/file"), id="no-such-keymap"),
        pytest.param(("SRC", "--against", "SRC/config.txt"), id="no-such-target"),
        pytest.param(("SRC", "--spec", "nonsense"), id="no-such-number"),
    ],
)
def test_what_cannot_be_told_exits_with_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    source = write_hf(tmp_path, llama_shapes())
    run = dcpconv("check", *(part.replace("SRC", str(source)) for part in arguments))
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stderr
    assert "Traceback" not in run.stderr


def test_a_bug_of_ours_is_could_not_tell(tmp_path: Path) -> None:
    script = (
        "import sys, dcpconv.checking.check\n"
        "def broken(*_, **__): raise RuntimeError('a bug')\n"
        "dcpconv.checking.check.check = broken\n"
        f"sys.argv = ['dcpconv', 'check', {str(tmp_path)!r}]\n"
        "from dcpconv.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "a bug" in run.stderr
    assert "report it" in run.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_an_interrupted_check_is_could_not_tell(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dcpconv", "check", "org/name"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            connection, _ = silent.accept()
            process.send_signal(number)
            assert process.wait(timeout=280) == 2
            connection.close()


def test_reports_go_where_they_are_sent(tmp_path: Path) -> None:
    MISFITS["missing"].damage(tmp_path / "a")
    for kind in KINDS:
        file = tmp_path / f"report.{kind}"
        run = dcpconv("check", tmp_path / "a", "--report", kind, "-o", file)
        assert run.returncode == 1
        assert "model.norm.weight" in file.read_text()
        assert "no        it does not fit: 2 missing" in run.stdout  # the log still says why
    assert json.loads((tmp_path / "report.json").read_text())["fits"] is False


def test_github_gets_its_summary_added(tmp_path: Path) -> None:
    MISFITS["missing"].damage(tmp_path / "a")
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    run = dcpconv("check", tmp_path / "a", "--report", "github", GITHUB_STEP_SUMMARY=str(summary))
    assert run.returncode == 1
    assert "::error title=dcpconv%3A missing::model.norm.weight" in run.stdout
    text = summary.read_text()
    assert text.startswith("before\n### dcpconv check: does not fit: 2 missing\n")
    assert "| missing | `model.norm.weight` |" in text


@pytest.mark.parametrize("layers", [3, 10_000])
def test_a_config_that_asks_for_too_much_costs_no_more_than_it_may(
    layers: int, tmp_path: Path
) -> None:
    config = {**CONFIG, "num_hidden_layers": layers}
    source = write_hf(tmp_path, llama_shapes(), config=config)
    run = dcpconv("check", source)
    assert run.returncode == 1
    assert len(run.stdout) < 20_000
