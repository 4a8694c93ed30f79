"""``dcpconv runs``: what it prints is a promise to scripts, and so are its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dcpconv import resolve_checkpoint
from dcpconv.cli.app import app
from support.runs import run_dirs
from support.runs.run_dirs import hf_trainer, write


def dcpconv(*words: object) -> Result:
    return CliRunner().invoke(app, ["runs", *map(str, words)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (5, 40, 300):
        hf_trainer(tmp_path, step, {"eval_loss": 1.0 / step})
    (tmp_path / "checkpoint-300" / "scheduler.pt").unlink()
    return tmp_path


def test_list_prints_one_step_a_line(run: Path) -> None:
    result = dcpconv("list", run)

    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:4] for row in rows[:3]] == [
        ["5", "hf-trainer", "hf", "complete"],
        ["40", "hf-trainer", "hf", "complete"],
        ["300", "hf-trainer", "hf", "incomplete"],
    ]
    assert rows[0][-1] == str(run / "checkpoint-5")
    assert result.stdout.splitlines()[3].startswith("why  checkpoint-300: no scheduler.pt")


def test_list_as_json_has_everything(run: Path) -> None:
    found = json.loads(dcpconv("list", run, "--json").stdout)

    assert [step["step"] for step in found] == [5, 40, 300]
    assert [step["complete"] for step in found] == [True, True, False]
    assert found[0]["holds"] == ["weights", "optimizer", "scheduler", "rng", "trainer state"]


def test_latest_prints_the_path_and_nothing_else(run: Path) -> None:
    result = dcpconv("latest", run)

    assert result.exit_code == 0
    assert result.stdout == f"{run / 'checkpoint-40'}\n"
    assert "checkpoint-300 was skipped: no scheduler.pt" in result.stderr


EXITS = [
    ("latest", (), 0),
    ("resolve", ("40",), 0),
    ("resolve", ("no",), 0),
    ("resolve", ("41",), 1),
    ("resolve", ("300",), 1),
    ("resolve", ("newest",), 2),
    ("verify", (), 1),
    ("prune", (), 2),
    ("prune", ("--keep-last", "1"), 0),
    ("prune", ("--keep-best", "eval_loss"), 2),
]


@pytest.mark.parametrize(("command", "words", "code"), EXITS, ids=str)
def test_exit_codes(command: str, words: tuple[str, ...], code: int, run: Path) -> None:
    result = dcpconv(command, run, *words)

    assert result.exit_code == code, result.output
    if code == 2 or (command == "resolve" and code):
        assert result.stdout == ""
        assert result.stderr


def test_an_empty_run_is_a_no_and_a_missing_one_an_error(tmp_path: Path) -> None:
    for command in ("list", "latest", "verify"):
        assert dcpconv(command, tmp_path).exit_code == 1
        assert dcpconv(command, tmp_path / "absent").exit_code == 2


def test_prune_prints_what_goes_and_deletes_only_with_yes(run: Path) -> None:
    said = dcpconv("prune", run, "--keep-last", "1").stdout
    assert f"delete    {run / 'checkpoint-5'}" in said
    assert "--yes does it" in said
    assert (run / "checkpoint-5").exists()

    assert "deleted   1 step" in dcpconv("prune", run, "--keep-last", "1", "--yes").stdout
    assert not (run / "checkpoint-5").exists()


def test_verify_finds_what_a_listing_cannot(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        hf_trainer(tmp_path, step)
    rows = {"a": [0, 12], "b": [8, 20]}  # the end is right, the tensors overlap
    header = json.dumps(
        {key: {"dtype": "F32", "shape": [3], "data_offsets": row} for key, row in rows.items()}
    )
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(20)
    write(tmp_path / "checkpoint-2", {"model.safetensors": data})
    write(tmp_path / "checkpoint-3", {"trainer_state.json": run_dirs.trainer_state(2)})

    result = dcpconv("verify", tmp_path)

    assert result.exit_code == 1
    assert f"ok        {tmp_path / 'checkpoint-1'}" in result.stdout
    assert f"problem   {tmp_path / 'checkpoint-2'}" in result.stdout
    assert "checkpoint-3: trainer_state.json: says global_step 2" in result.stdout
    assert dcpconv("latest", tmp_path).stdout == f"{tmp_path / 'checkpoint-3'}\n"
    assert dcpconv("latest", tmp_path, "--verify").stdout == f"{tmp_path / 'checkpoint-1'}\n"
    for word in ("latest", "auto"):
        found = dcpconv("resolve", tmp_path, word, "--verify")
        assert found.stdout == f"{tmp_path / 'checkpoint-1'}\n"
        resolved = resolve_checkpoint(word, tmp_path, verify=True)
        assert resolved is not None
        assert resolved.step == 1
    assert dcpconv("resolve", tmp_path, "2", "--verify").exit_code == 1
    assert dcpconv("resolve", tmp_path, "2").exit_code == 0


EXAMPLES = Path(__file__).parents[3] / "examples"


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run an example as a user would, with the console script of this interpreter first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(EXAMPLES / name), *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_shell_examples_do_what_they_say(run: Path) -> None:
    picked = script("pick_latest.sh", run)
    assert picked.returncode == 0, picked.stderr
    assert f"--resume_from_checkpoint {run / 'checkpoint-40'}" in picked.stdout
    fresh = script("pick_latest.sh", run / "absent")
    assert fresh.returncode == 0, fresh.stderr
    assert "fresh start" in fresh.stdout

    for step in (400, 500):
        hf_trainer(run, step)
    kept = script("keep_last_three.sh", run, "--yes")
    assert kept.returncode == 0, kept.stderr
    assert not (run / "checkpoint-5").exists()
    assert (run / "checkpoint-40").exists()
