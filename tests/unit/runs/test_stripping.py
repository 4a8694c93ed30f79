"""Stripping deletes optimizers of finished steps, never weights, and leaves nothing half done."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dcpconv import find_checkpoints, find_latest_checkpoint, open_checkpoint, resolve_checkpoint
from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError
from dcpconv.runs import Best, Retention, RunError, prune, strip, verify_checkpoints
from support.runs import run_dirs
from support.runs.run_dirs import hf_fsdp, hf_trainer, hf_zero, safetensors, saved, verl, write


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


MARK = "dcpconv-stripped.json"
GONE = [
    (hf_trainer, {"optimizer.pt", "scheduler.pt"}),
    (
        hf_fsdp,
        {"scheduler.pt"} | {f"optimizer_0/{n}" for n in run_dirs.dcp_files()},
    ),
    (
        run_dirs.hf_fsdp_ranks,
        {"scheduler.pt"} | {f"optimizer_0_rank{rank}.bin" for rank in range(2)},
    ),
    (run_dirs.accelerate, {"optimizer.bin", "scheduler.bin"}),
    (
        hf_zero,
        {"scheduler.pt"}
        | {f"global_step1/bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2)},
    ),
    (verl, {f"actor/optim_world_size_2_rank_{r}.pt" for r in range(2)}),
]


@pytest.mark.parametrize(("make", "gone"), GONE, ids=[row[0].__name__ for row in GONE])
def test_the_optimizer_goes_and_every_other_byte_stays(
    make: run_dirs.Maker, gone: set[str], tmp_path: Path
) -> None:
    paths = [make(tmp_path, step) for step in (1, 2, 3)]
    before = [contents(path) for path in paths]

    said = strip(tmp_path, keep_last=2)
    assert [contents(path) for path in paths] == before

    done = strip(tmp_path, keep_last=2, yes=True)

    after = [contents(path) for path in paths]
    assert after[1:] == before[1:]
    assert set(before[0]) - set(after[0]) == gone
    assert {name: data for name, data in after[0].items() if name != MARK} == {
        name: data for name, data in before[0].items() if name not in gone
    }
    assert said.nbytes == done.nbytes == sum(len(before[0][name]) for name in gone)
    steps = find_checkpoints(tmp_path)
    assert [step.is_stripped for step in steps] == [True, False, False]
    assert steps[0].problems == ()
    assert all(verify_checkpoints(tmp_path))


ALL_IN_ONE = [run_dirs.lingua, run_dirs.torchtitan, run_dirs.zero]


@pytest.mark.parametrize("make", ALL_IN_ONE, ids=lambda make: make.__name__)
def test_where_weights_and_optimizer_share_files_nothing_goes(
    make: run_dirs.Maker, tmp_path: Path
) -> None:
    for step in (1, 2):
        make(tmp_path, step)
    before = contents(tmp_path)

    stripping = strip(tmp_path, yes=True)

    assert contents(tmp_path) == before
    assert stripping.stripped == ()
    assert "share files" in stripping.left[0][1] or "are in the" in stripping.left[0][1]


def test_minimind_files_and_stage_3_without_gathered_weights_stay(tmp_path: Path) -> None:
    run_dirs.minimind(tmp_path / "a", 1)
    for step in (1, 2):
        hf_zero(tmp_path / "b", step, stage=3)
    before = contents(tmp_path)

    reasons = [strip(tmp_path / name, yes=True).left[0][1] for name in ("a", "b")]

    assert contents(tmp_path) == before
    assert reasons == ["newest", "its weights are in the optimizer's files"]


def test_a_stripped_step_is_no_step_to_go_on_from(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        hf_trainer(tmp_path, step, {"eval_loss": step})
    strip(tmp_path, yes=True)

    assert find_latest_checkpoint(tmp_path) == find_checkpoints(tmp_path)[2]
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert find_latest_checkpoint(tmp_path) is None
    with pytest.raises(RunError, match="was stripped"):
        resolve_checkpoint(2, tmp_path)
    best = resolve_checkpoint("best:eval_loss:min", tmp_path, verify=True)
    assert best is not None
    assert best.step == 1
    assert open_checkpoint(best.weights).tensors


def test_pruning_leaves_stripped_steps_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        hf_trainer(tmp_path, step)
    strip(tmp_path, yes=True)
    for step in (4, 5):
        hf_trainer(tmp_path, step)

    decision = prune(tmp_path, Retention(keep_last=1), yes=True).decision

    assert [step.step for step in decision.removed] == [3, 4]
    assert [row.reasons for row in decision.kept][:2] == [("stripped",), ("stripped",)]


def test_the_newest_are_those_that_verify(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = hf_trainer(tmp_path, step)
    (path / "optimizer.pt").write_bytes(bytes(500))

    strip(tmp_path, yes=True)

    assert [step.is_stripped for step in find_checkpoints(tmp_path)] == [True, False, False]


def test_what_links_lead_to_stays_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        hf_trainer(tmp_path, step)
    (tmp_path / "best").symlink_to("checkpoint-2")
    shared = tmp_path / "checkpoint-4" / "optimizer.pt"
    shared.unlink()
    shared.symlink_to("../checkpoint-3/optimizer.pt")
    elsewhere = hf_trainer(tmp_path / "away", 9)
    (tmp_path / "checkpoint-0").symlink_to(elsewhere)
    before = contents(elsewhere)

    strip(tmp_path, yes=True)

    assert [s.step for s in find_checkpoints(tmp_path) if s.is_stripped] == [1]
    assert contents(elsewhere) == before
    assert all(verify_checkpoints(tmp_path))


def test_files_behind_a_link_inside_a_step_are_not_its_own(tmp_path: Path) -> None:
    for step in (1, 2):
        hf_zero(tmp_path / "run", step)
    moved = tmp_path / "store"
    shutil.move(tmp_path / "run/checkpoint-1/global_step1", moved)
    (tmp_path / "run/checkpoint-1/global_step1").symlink_to(moved)
    before = contents(moved)

    strip(tmp_path / "run", yes=True)

    assert contents(moved) == before


@pytest.mark.parametrize("allowed", range(9))
def test_an_interruption_leaves_every_step_whole_or_stripped(
    allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        hf_fsdp(tmp_path, step)
        write(tmp_path / f"checkpoint-{step}", {"scaler.pt": saved()})
    done = 0

    def counted(name: str) -> None:
        function = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal done
            if done == allowed:
                raise KeyboardInterrupt
            done += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
        # Before Python 3.11 pathlib keeps functions of its own.
        accessor = getattr(pathlib, "_NormalAccessor", None)
        if hasattr(accessor, name):
            monkeypatch.setattr(accessor, name, staticmethod(call))

    for name in ("unlink", "replace", "rename", "rmdir"):
        counted(name)
    with pytest.raises(KeyboardInterrupt):
        strip(tmp_path, yes=True)
    monkeypatch.undo()

    steps = find_checkpoints(tmp_path)
    assert [step.problems for step in steps] == [(), (), ()]
    assert steps[2].is_complete
    assert all(verify_checkpoints(tmp_path))

    strip(tmp_path, yes=True)
    assert [step.is_stripped for step in find_checkpoints(tmp_path)] == [True, True, False]
    left = {file for step in (1, 2) for file in contents(tmp_path / f"checkpoint-{step}")}
    assert not any(name.startswith(("optimizer", "sched", "scaler")) for name in left)


def test_the_command_is_dry_unless_told(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        hf_trainer(tmp_path, step)
    before = contents(tmp_path)

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["runs", "strip", str(tmp_path), *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    said = run()
    assert f"strip     {tmp_path / 'checkpoint-1'}" in said
    assert f"leave     {tmp_path / 'checkpoint-3'}  (newest)" in said
    assert "--yes does it" in said
    assert contents(tmp_path) == before

    found = json.loads(run("--keep-last", "2", "--yes", "--json"))
    assert [row["files"] for row in found["stripped"]] == [["optimizer.pt", "scheduler.pt"]]
    listed = CliRunner().invoke(app, ["runs", "list", str(tmp_path)]).stdout.splitlines()
    assert [line.split()[3] for line in listed] == ["stripped", "complete", "complete"]


def test_an_adapters_step_is_stripped_too(tmp_path: Path) -> None:
    for step in (1, 2):
        path = hf_trainer(tmp_path, step)
        (path / "model.safetensors").unlink()
        write(path, {"adapter_model.safetensors": safetensors()})

    strip(tmp_path, yes=True)

    first, second = find_checkpoints(tmp_path)
    assert (first.is_stripped, first.holds) == (True, ("adapter", "trainer state"))
    assert second.is_complete


def test_at_least_one_step_stays_whole(tmp_path: Path) -> None:
    hf_trainer(tmp_path, 1)
    with pytest.raises(DcpconvError, match="keeps its optimizer"):
        strip(tmp_path, keep_last=0, yes=True)


def test_the_best_by_a_metric_stays_if_it_was_stripped(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        hf_trainer(tmp_path, step, {"eval_loss": step})
    strip(tmp_path, keep_last=2, yes=True)

    prune(tmp_path, Retention(keep_best=(Best("eval_loss", "min"),)), yes=True)

    assert [step.step for step in find_checkpoints(tmp_path)] == [1, 2, 3, 4]
