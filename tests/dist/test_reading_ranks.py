"""Tensors read by the ranks of torchrun: each reads a share, and all give one process's answer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dcpconv import fingerprint
from dcpconv.cli.app import app
from dcpconv.engine.manifests import MANIFEST
from support.models.hf_models import save_hf, tiny
from support.worlds.conversions import agent, ends, script, start, torchrun

COUNTS = """
import os
from pathlib import Path
from dcpconv.engine.worlds.watching import Watch
leave = Watch.__exit__
def counted(watch, *how):
    leave(watch, *how)
    Path({directory!r}, "read-by-" + os.environ["RANK"]).write_text(str(watch.nbytes))
Watch.__exit__ = counted
"""
"""A rank that leaves behind how many bytes it has read."""

FAILS = """
import os
from dcpconv.core.errors import FormatError
from dcpconv.plan import readers
def fail(*_, **__):
    raise FormatError("the disk is broken", [("file", "model.safetensors")])
readers.hash_all = fail
"""
"""A rank that cannot read its share."""

DIES = """
import os, signal
from dcpconv.plan import readers
readers.hash_all = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
"""

OTHER_CLOCK = """
from dcpconv.engine.worlds import look
mark = look._mark
look._mark = lambda path, mtime: mark(path, mtime + 1)
"""
"""A rank on whose host the files were written at another time."""

BIG = (3 << 20) + 4096
"""Bytes of a tensor whose digest is of four chunks, and which several ranks read."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys that no table knows, among them a tensor that is most of the file."""
    made = tmp_path_factory.mktemp("hf") / "source"
    made.mkdir()
    tensors = {f"{at}.small": torch.randn(64, 64 + at) for at in range(9)}
    tensors["5.big"] = torch.randn(BIG // 4)
    tensors["6.empty"] = torch.zeros(0, 3)
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def manifest(source: Path) -> Path:
    path = source.parent / "manifest.json"
    fingerprint(source).write(path)
    return path


def rot(source: Path, directory: Path, *, at: int = -3) -> Path:
    """A copy of which one byte is another."""
    made = Path(shutil.copytree(source, directory / "rotten"))
    with (made / "model.safetensors").open("r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    return made


def alone(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and stdout of one process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout


def ranks(
    programs: Sequence[str], *arguments: str | Path, each: Sequence[Sequence[str | Path]] = ()
) -> list[tuple[int, str, str]]:
    """How processes end that meet as the workers of one torchrun do, but end each for itself."""
    with agent(len(programs)) as given:
        return ends(
            [
                start(program, *arguments, *(each[rank] if each else ()), given=given[rank])
                for rank, program in enumerate(programs)
            ]
        )


def read_by(directory: Path) -> list[int]:
    """Bytes by rank."""
    return [int(file.read_text()) for file in sorted(directory.glob("read-by-*"))]


def test_torchrun_finds_what_rotted_in_the_share_of_another_rank(
    source: Path, manifest: Path, tmp_path: Path
) -> None:
    rotten = rot(source, tmp_path)
    arguments = ("check", rotten, "--data", "--against", manifest)
    program = script(before=COUNTS.format(directory=str(tmp_path)))
    done = torchrun(2, tmp_path, program, *arguments)
    assert done.returncode == 1
    assert (1, done.stdout) == alone(*arguments)
    assert "8.small" in done.stdout
    read = read_by(tmp_path)
    assert all(read)
    assert sum(read) == sum(tensor.nbytes for tensor in fingerprint(source).tensors)


def test_torchrun_says_that_all_is_well_once(source: Path, manifest: Path, tmp_path: Path) -> None:
    arguments = ("check", source, "--data", "--against", manifest, "--report", "json")
    done = torchrun(2, tmp_path, script(), *arguments)
    assert done.returncode == 0, done.stderr
    assert (0, done.stdout) == alone(*arguments)


def test_every_rank_ends_with_the_one_answer(source: Path, manifest: Path, tmp_path: Path) -> None:
    rotten = rot(source, tmp_path, at=-BIG // 2)
    arguments = ("check", rotten, "--data", "--against", manifest)
    found = ranks([script()] * 4, *arguments)
    assert [code for code, _, _ in found] == [1] * 4, found
    assert (1, found[0][1]) == alone(*arguments)
    assert [out for _, out, _ in found[1:]] == [""] * 3


def test_a_fingerprint_is_that_of_one_process(source: Path, tmp_path: Path) -> None:
    """Of tensors that several ranks read, and of some whose rows change places on the way."""
    llama = save_hf(tiny("llama"), tmp_path / "llama")
    for path in (source, llama):
        found = ranks([script()] * 3, "fingerprint", path, "--json")
        assert [code for code, _, _ in found] == [0] * 3, found
        assert json.loads(found[0][1]) == fingerprint(path).to_json()
        assert [out for _, out, _ in found[1:]] == ["", ""]


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A run of two steps, of which the second has rotted."""
    for step in (100, 200):
        made = tmp_path / f"run/checkpoint-{step}"
        shutil.copytree(source, made)
        (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        fingerprint(made).write(made / MANIFEST)
    rotten = rot(tmp_path / "run/checkpoint-200", tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoint-200")
    rotten.rename(tmp_path / "run/checkpoint-200")
    return tmp_path / "run"


def test_steps_of_a_run_are_verified_together(run: Path) -> None:
    found = ranks([script()] * 2, "runs", "verify", run, "--deep")
    assert [code for code, _, _ in found] == [1, 1], found
    assert (1, found[0][1]) == alone("runs", "verify", run, "--deep")
    assert "checkpoint-200: changed: 8.small" in found[0][1]
    assert found[1][1] == ""


def test_a_step_that_a_rank_cannot_read_is_a_problem_of_that_step(run: Path) -> None:
    once = FAILS.replace("def fail(", "hash_all = readers.hash_all\ndef fail(") + (
        "def fails_once(*how, **options):\n"
        "    readers.hash_all = hash_all\n"
        "    fail()\n"
        "readers.hash_all = fails_once\n"
    )
    found = ranks([script(), script(before=once)], "runs", "verify", run, "--deep")
    assert [code for code, _, _ in found] == [1, 1], found
    assert "checkpoint-100: it cannot be read (the disk is broken" in found[0][1]
    assert "checkpoint-200: changed: 8.small" in found[0][1]


def test_ranks_that_see_another_run_are_an_error(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (other / "checkpoint-100/model.safetensors").write_bytes(b"")
    each = [(run, "--deep"), (other, "--deep")]
    found = ranks([script()] * 2, "runs", "verify", each=each)
    assert [code for code, _, _ in found] == [2, 2], found
    assert "RankError" in found[0][2]


def test_a_rank_that_finds_something_else_is_an_error(
    source: Path, manifest: Path, tmp_path: Path
) -> None:
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "more").mkdir()
    more = {**tensors, "9.more": torch.zeros(2)}
    save_file(more, tmp_path / "more/model.safetensors", {"format": "pt"})
    fingerprint(tmp_path / "more").write(tmp_path / "more.json")
    each = [("--against", manifest), ("--against", tmp_path / "more.json")]
    found = ranks([script()] * 2, "check", source, "--data", each=each)
    for code, out, err in found:
        assert (code, out) == (2, "")
        assert "the ranks come to different answers" in err
        assert "all is well" in err
        assert "missing  9.more" in err


def test_ranks_that_read_other_tensors_are_an_error(
    source: Path, manifest: Path, tmp_path: Path
) -> None:
    fingerprint(source, only="*.small").write(tmp_path / "less.json")
    each = [("--against", manifest), ("--against", tmp_path / "less.json")]
    found = ranks([script()] * 2, "check", source, "--data", each=each)
    for code, _, err in found:
        assert code == 2
        assert "the ranks plan different results" in err


@pytest.mark.parametrize("broken", [0, 1])
def test_a_share_that_cannot_be_read_ends_all(broken: int, source: Path, manifest: Path) -> None:
    programs = [script(before=FAILS if rank == broken else "") for rank in range(3)]
    found = ranks(programs, "check", source, "--data", "--against", manifest)
    for code, out, err in found:
        assert (code, out) == (2, "")
        assert "the disk is broken" in err
        assert f"rank      {broken} on" in err


def test_a_rank_that_dies_is_named(source: Path, manifest: Path) -> None:
    programs = [script(), script(before=DIES), script()]
    found = ranks(programs, "check", source, "--data", "--against", manifest)
    assert [code for code, _, _ in found] == [2, -9, 2]
    for _, _, err in (found[0], found[2]):
        assert "rank 1 has ended without a word" in err


def test_a_source_that_looks_different_is_named(source: Path, manifest: Path) -> None:
    programs = [script(), script(before=OTHER_CLOCK)]
    found = ranks(programs, "check", source, "--data", "--against", manifest)
    for code, _, err in found:
        assert code == 2
        assert "model.safetensors: written at another time" in err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_source_that_one_rank_does_not_find_ends_all(
    rank: int, source: Path, tmp_path: Path
) -> None:
    each = [(tmp_path / "no" if one == rank else source,) for one in range(2)]
    found = ranks([script()] * 2, "fingerprint", each=each)
    for code, _, err in found:
        assert code == 2
        assert "NotACheckpointError" in err


def test_a_report_that_rank_0_cannot_write_ends_all(source: Path, tmp_path: Path) -> None:
    found = ranks([script()] * 2, "fingerprint", source, "-o", tmp_path / "no/where.json")
    assert [code for code, _, _ in found] == [2, 2], found


def test_only_torchrun_brings_readers_together(source: Path) -> None:
    done = CliRunner().invoke(app, ["fingerprint", str(source), "--rank", "0", "--of", "2"])
    assert done.exit_code == 2
    assert "only if torchrun has started them" in done.stderr
    assert "-m dcpconv fingerprint SRC" in done.stderr


def test_one_process_below_torchrun_reads_alone(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with agent(2) as given:
        for name, value in given[0].items():
            monkeypatch.setenv(name, value)
        expected = f"{fingerprint(source).digest}\n"
        assert alone("fingerprint", source, "--of", "1") == (0, expected)
