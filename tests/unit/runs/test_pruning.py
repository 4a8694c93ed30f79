"""Pruning deletes what the decision says, only when told to, and leaves the rest whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dcpconv import find_checkpoints
from dcpconv.core.errors import DcpconvError
from dcpconv.runs import Best, Retention, prune, pruning
from support.runs import run_dirs
from support.runs.run_dirs import MAKERS, hf_trainer, write

LOSSES = {100: 3.0, 200: 2.0, 300: 2.5, 400: 2.75}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, loss in LOSSES.items():
        hf_trainer(tmp_path, step, {"eval_loss": loss})
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_without_yes_nothing_is_touched(run: Path) -> None:
    before = names(run)

    pruning = prune(run, Retention(keep_last=1))

    assert [step.step for step in pruning.decision.removed] == [100, 200, 300]
    assert not pruning.is_done
    assert names(run) == before


def test_the_last_the_best_and_every_nth_stay(run: Path) -> None:
    hf_trainer(run, 500, {"eval_loss": 4.0})

    retention = Retention(keep_last=1, keep_every=300, keep_best=(Best("eval_loss", "min"),))
    pruning = prune(run, retention, yes=True)

    assert names(run) == ["checkpoint-200", "checkpoint-300", "checkpoint-500"]
    assert pruning.nbytes > 0
    assert {kept.step.step: kept.reasons for kept in pruning.decision.kept} == {
        200: ("best eval_loss",),
        300: ("every 300",),
        500: ("newest", "last 1"),
    }


def test_an_unknown_metric_deletes_nothing_and_names_those_there_are(run: Path) -> None:
    with pytest.raises(DcpconvError, match="no step has the metric 'loss'") as caught:
        prune(run, Retention(keep_best=(Best("loss", "min"),)), yes=True)

    assert ("found", "eval_loss") in caught.value.facts
    assert len(names(run)) == 4


def test_linguas_log_of_the_run_is_read(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        run_dirs.lingua(tmp_path / "checkpoints", step)
    log = [{"global_step": step, "loss": {"out": value}} for step, value in ((10, 1.0), (20, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n{cut")

    prune(tmp_path, Retention(keep_best=(Best("loss/out", "min"),)), yes=True)

    assert names(tmp_path / "checkpoints") == ["0000000010", "0000000030"]


@pytest.mark.parametrize("layout", MAKERS)
def test_incomplete_steps_and_strangers_stay(layout: str, tmp_path: Path) -> None:
    paths = [MAKERS[layout](tmp_path, step) for step in (1, 2, 3, 4)]
    for name in ("trainer_state.json", ".metadata", "model.safetensors"):
        (paths[1] / name).unlink(missing_ok=True)
        (paths[3] / name).unlink(missing_ok=True)
    strangers = ["checkpoint-1-merged", "checkpoint-best", "logs", ".step-1.dcpconv-trash-not"]
    for name in strangers:
        write(tmp_path / name, {"model.safetensors": "w"})

    prune(tmp_path, Retention(keep_last=1), yes=True)

    assert names(tmp_path) == sorted([*(path.name for path in paths[1:]), *strangers])


def test_minimind_files_stay(tmp_path: Path) -> None:
    run_dirs.minimind(tmp_path, 1, name="pretrain_96")
    run_dirs.minimind(tmp_path, 2, name="full_sft_96")

    prune(tmp_path, Retention(keep_last=1), yes=True)

    assert len(names(tmp_path)) == 2


def test_nothing_behind_a_symbolic_link_is_deleted(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    away = tmp_path_factory.mktemp("archive")
    target = hf_trainer(away, 50)
    (run / "checkpoint-50").symlink_to(target)
    outside = write(away / "data", {"precious": "x"})
    (run / "checkpoint-100" / "data").symlink_to(outside)

    prune(run, Retention(keep_last=1), yes=True)

    assert names(run) == ["checkpoint-400", "checkpoint-50"]
    assert (target / "model.safetensors").exists()
    assert (outside / "precious").exists()


def test_a_link_to_the_directory_of_steps_protects_them(tmp_path: Path) -> None:
    for step in (1, 2):
        hf_trainer(tmp_path / "real", step)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "real")

    prune(tmp_path / "run", Retention(keep_last=1), yes=True)

    assert names(tmp_path / "real") == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("allowed", range(8))
def test_interrupted_pruning_leaves_every_remaining_step_whole(
    allowed: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink
    done = 0

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal done
        if done == allowed:
            raise KeyboardInterrupt
        done += 1
        unlink(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", counted)
    with pytest.raises(KeyboardInterrupt):
        prune(run, Retention(keep_last=1), yes=True)
    monkeypatch.undo()

    left = find_checkpoints(run)
    assert left[-1].step == 400
    assert all(step.is_complete for step in left)

    prune(run, Retention(keep_last=1), yes=True)
    assert names(run) == ["checkpoint-400"]


def test_a_step_that_became_a_link_meanwhile_is_not_deleted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(directory: Path) -> None:
        if (directory / "checkpoint-100").is_dir():
            shutil.move(run / "checkpoint-100", run / "moved")
            (run / "checkpoint-100").symlink_to(run / "moved")

    monkeypatch.setattr(pruning, "_empty_trash", swap)  # what comes between decision and deed

    with pytest.raises(DcpconvError, match="no longer"):
        prune(run, Retention(keep_last=1), yes=True)
    assert (run / "moved" / "model.safetensors").exists()
