"""Run directories made to crash, stall or fool a tool that lists and deletes."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dcpconv import find_checkpoints, resolve_checkpoint
from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError
from dcpconv.runs import Best, Retention, prune, verify_checkpoints
from support.machine.counting import lines_run
from support.runs import run_dirs
from support.runs.asked import only_our_errors
from support.runs.run_dirs import hf_trainer, safetensors, saved, write

DEEP = "[" * 100_000


class Boom:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


JSON = [
    pytest.param(DEEP, id="too-deep"),
    pytest.param("[1, 2]", id="list"),
    pytest.param('{"weight_map": 5}', id="number"),
    pytest.param('{"weight_map": {"a": ["b"]}}', id="list-of-names"),
    pytest.param("\udcff", id="not-utf8"),
    pytest.param('{"log_history": [5, null, {"step": "x", "eval_loss": "y"}]}', id="odd-log"),
]


@pytest.mark.parametrize("text", JSON)
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors.index.json", "params.json"]
)
def test_odd_json_is_a_problem_and_no_crash(name: str, text: str, tmp_path: Path) -> None:
    paths = [hf_trainer(tmp_path, 1), hf_trainer(tmp_path, 2), run_dirs.lingua(tmp_path, 3)]
    for path in paths:
        (path / "model.safetensors").unlink(missing_ok=True)
        (path / name).write_bytes(text.encode("utf-8", "surrogateescape"))

    assert len(find_checkpoints(tmp_path)) == 3
    assert len(list(verify_checkpoints(tmp_path))) == 3
    with pytest.raises(DcpconvError):
        prune(tmp_path, Retention(keep_best=(Best("eval_loss", "min"),)), yes=True)


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    torch.save({"model": {}, "optimizer": Boom(mark), "step": 1}, tmp_path / "x_resume.pth")
    path = hf_trainer(tmp_path, 1)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": Boom(mark)}, path / name)
    step = write(tmp_path / "step-1", {"__0_0.distcp": b"d"})
    (step / ".metadata").write_bytes(pickle.dumps(["__0_0.distcp", Boom(mark)]))

    list(verify_checkpoints(tmp_path))
    with pytest.raises(DcpconvError):
        resolve_checkpoint(tmp_path / "x_resume.pth", tmp_path)

    assert not mark.exists()


def test_links_in_circles_and_to_nowhere(tmp_path: Path) -> None:
    path = hf_trainer(tmp_path, 1)
    (path / "loop").symlink_to(path)
    (path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "absent")
    (tmp_path / "checkpoint-3").symlink_to(tmp_path)

    steps = find_checkpoints(tmp_path)

    assert [step.step for step in steps if step.is_complete] == [1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x_resume.pth")
    hf_trainer(tmp_path, 1)

    assert [step.step for step in find_checkpoints(tmp_path)] == [1]


def test_absurd_rank_numbers_do_not_allocate(tmp_path: Path) -> None:
    path = hf_trainer(tmp_path, 1)
    write(path, {"rng_state_999999999.pth": run_dirs.saved()})
    (path / "rng_state.pth").unlink()
    params = json.dumps({"distributed": {"dp_shard": 9_999_999, "dp_replicate": 9_999_999}})
    write(run_dirs.lingua(tmp_path, 2), {"params.json": params})

    problems = [step.problems for step in find_checkpoints(tmp_path)]

    assert all(0 < len(found) <= 8 for found in problems)


def dcpconv(*words: object) -> Result:
    return CliRunner().invoke(app, ["runs", *map(str, words)])


def empty_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w"):
        pass


def zip_of_others(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/b", b"x")


def no_entries(path: Path) -> None:
    """A file of torch.save whose end says that its directory has no entries."""
    data = saved()
    at = data.rindex(b"PK\x06\x06")
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 0, at, 0)
    path.write_bytes(data[:at] + end)


def huge_directory(path: Path) -> None:
    """A hole of a terabyte, all of it directory as its end says."""
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 0xFFFFFFF0, 64, 0)
    with path.open("wb") as file:
        file.write(saved())
        file.truncate(1 << 40)
        file.seek(0, os.SEEK_END)
        file.write(end)


@pytest.mark.parametrize("make", [empty_zip, zip_of_others, no_entries, huge_directory])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "pytorch_model.bin"])
def test_one_odd_zip_is_one_line(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    hf_trainer(tmp_path, 1)
    path = hf_trainer(tmp_path, 2)
    if name == "pytorch_model.bin":
        (path / "model.safetensors").unlink()
    make(path / name)

    only_our_errors(tmp_path)

    first, second = find_checkpoints(tmp_path)
    assert first.is_complete
    assert any(problem.startswith(f"{name}: ") for problem in second.problems)


@pytest.mark.parametrize("make", [empty_zip, zip_of_others, no_entries])
def test_an_odd_zip_as_minimind_file_is_one_line(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    hf_trainer(tmp_path, 1)
    make(tmp_path / "pretrain_512_resume.pth")

    only_our_errors(tmp_path)

    assert [step.is_complete for step in find_checkpoints(tmp_path)] == [False, True]


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "metrics.json", "model.safetensors.index.json", ".metadata", "latest"],
)
def test_a_text_of_a_terabyte_is_not_read(name: str, tmp_path: Path) -> None:
    for path in (hf_trainer(tmp_path, 1), run_dirs.lingua(tmp_path, 2)):
        with (path / name).open("wb") as file:
            file.truncate(1 << 40)

    only_our_errors(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.eval.jsonl", "latest"])
@pytest.mark.parametrize("kind", ["pipe", "zeros without end", "directory"])
def test_files_of_the_run_are_regular_files_or_none(name: str, kind: str, tmp_path: Path) -> None:
    hf_trainer(tmp_path, 1, {"eval_loss": 1.0})
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "directory":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/dev/zero")

    only_our_errors(tmp_path)

    assert resolve_checkpoint("best:eval_loss:min", tmp_path) is not None


ODD_LOGS = [
    '{"global_step": [1], "eval_loss": 1}',
    '{"global_step": {"a": 1}, "eval_loss": 1}',
    '{"global_step": 1, "eval_loss": 1' + "0" * 400 + "}",
    '{"global_step": 1, "eval_loss": 1' + "0" * 5000 + "}",
    '{"global_step": true, "eval_loss": [[]]}',
    '{"global_step": 1, "eval_loss": ' + "[" * 9000,
]


@pytest.mark.parametrize("line", ODD_LOGS, ids=lambda line: line[:40])
def test_odd_logs_are_passed_over(line: str, tmp_path: Path) -> None:
    hf_trainer(tmp_path, 1, {"eval_loss": 1.0})
    write(tmp_path, {"metrics.jsonl": line + "\n"})

    only_our_errors(tmp_path)

    assert resolve_checkpoint("best:eval_loss:min", tmp_path) is not None


def test_links_that_multiply_are_followed_once(tmp_path: Path) -> None:
    def work(links: int) -> int:
        run = tmp_path / str(links)
        path = hf_trainer(run, 1)
        for number in range(links):
            (path / f"loop{number}").symlink_to(path)
            (path / f"up{number}").symlink_to(run)
        return lines_run(lambda: find_checkpoints(run))

    assert work(40) < 6 * work(10)  # followed again at every depth, it would be 256 times


def test_a_run_directory_that_cannot_be_named(tmp_path: Path) -> None:
    for run in (
        Path("a\0b"),
        Path("~nobody-of-this-name/run"),
        Path("x" * 5000),
        Path("/".join(["x" * 200] * 50)),
        tmp_path / "loop",
    ):
        if run.name == "loop":
            run.symlink_to(run)
        only_our_errors(run)
        for command in ("list", "latest", "verify", "strip"):
            result = dcpconv(command, run)
            assert result.exit_code in {1, 2}
            assert "mistake in dcpconv" not in result.stderr
    for wanted in ("a\0b/c", "~nobody-of-this-name/x", "x" * 5000, "./" + "y" * 5000):
        with pytest.raises(DcpconvError):
            resolve_checkpoint(wanted, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    hf_trainer(tmp_path, 1)
    path = hf_trainer(tmp_path, 2)
    path.chmod(0)
    try:
        only_our_errors(tmp_path)
        assert [step.is_complete for step in find_checkpoints(tmp_path)] == [True, False]
    finally:
        path.chmod(0o700)


def test_a_step_that_cannot_be_listed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        hf_trainer(tmp_path, step)
    scandir = os.scandir

    def refuses(path: str | Path) -> object:
        if str(path).endswith("checkpoint-2"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)

    steps = find_checkpoints(tmp_path)

    assert [step.problems for step in steps] == [
        (),
        ("it cannot be read (Permission denied)",),
        (),
    ]
    with pytest.raises(DcpconvError, match="cannot be read"):
        prune(tmp_path, Retention(keep_last=1))  # whose links nobody knows


ESCAPE = "\x1b]0;title\x07\x1b[31m"


def test_control_characters_are_escaped_in_what_is_printed(tmp_path: Path) -> None:
    run = tmp_path / f"run{ESCAPE}\n"
    path = hf_trainer(run, 1)
    hf_trainer(run, 2)
    write(path, {f"x{ESCAPE}.pt": b"no", "model.safetensors": safetensors(**{ESCAPE: EMPTY})})
    run_dirs.minimind(run, 3, name=f"pre{ESCAPE}")

    for words in (
        ("list", run),
        ("list", run, "--json"),
        ("verify", run),
        ("verify", run, "--json"),
        ("latest", run),
        ("latest", run, "--json"),
        ("resolve", run, "1"),
        ("resolve", run, "2"),
        ("resolve", run, ESCAPE),
        ("prune", run, "--keep-last", "1"),
        ("strip", run),
    ):
        result = dcpconv(*words)
        assert not {"\x1b", "\x07"} & set(result.stdout), words
        assert "mistake in dcpconv" not in result.stderr


EMPTY = torch.empty(0)


def test_names_that_are_not_utf8_are_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"lauf-\xe4")
    try:
        hf_trainer(tmp_path / name, 1)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")

    assert "lauf-\\udce4" in dcpconv("list", tmp_path / name).stdout
    assert dcpconv("list", tmp_path / name, "--json").exit_code == 0
    for words in (("latest", tmp_path / name), ("resolve", tmp_path / name, "1")):
        result = dcpconv(*words)
        assert result.stdout_bytes == os.fsencode(tmp_path / name / "checkpoint-1") + b"\n"


@pytest.mark.parametrize("seconds", [2**55, -(2**55), 2**40])
def test_times_that_no_calendar_has(seconds: int, tmp_path: Path) -> None:
    path = hf_trainer(tmp_path, 1)
    try:
        for file in path.iterdir():
            os.utime(file, (seconds, seconds))
    except (OSError, OverflowError):
        pytest.skip("this file system has no such times")

    assert dcpconv("list", tmp_path).exit_code == 0
    assert dcpconv("list", tmp_path, "--json").exit_code == 0
