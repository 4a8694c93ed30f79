"""The best step by a metric, one of several runs of MiniMind, and hints that can be pasted."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dcpconv import find_latest_checkpoint, resolve_checkpoint
from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError
from dcpconv.runs import RunError, WantedError
from support.runs import run_dirs
from support.runs.run_dirs import hf_trainer, write


def dcpconv(*words: object) -> Result:
    return CliRunner().invoke(app, ["runs", *map(str, words)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, loss in ((5, 3.0), (10, 1.0), (15, 2.0), (20, 0.5), (25, 4.0)):
        hf_trainer(tmp_path, step, {"eval_loss": loss})
    (tmp_path / "checkpoint-20" / "scheduler.pt").unlink()
    return tmp_path


BEST = [("best:eval_loss:min", 10), ("best:eval_loss:max", 25)]


@pytest.mark.parametrize(("wanted", "step"), BEST)
def test_the_best_complete_step(wanted: str, step: int, run: Path) -> None:
    found = resolve_checkpoint(wanted, run)

    assert found is not None
    assert found.step == step
    assert dcpconv("resolve", run, wanted).stdout == f"{run / f'checkpoint-{step}'}\n"


def test_the_best_step_that_verifies(run: Path) -> None:
    write(run / "checkpoint-10", {"trainer_state.json": run_dirs.trainer_state(11)})
    state = json.loads((run / "checkpoint-10" / "trainer_state.json").read_text())
    state["log_history"] = [{"step": 10, "eval_loss": 1.0}]
    write(run / "checkpoint-10", {"trainer_state.json": json.dumps(state)})

    found = [resolve_checkpoint("best:eval_loss:min", run, verify=v) for v in (False, True)]

    assert [step.step for step in found if step] == [10, 15]


def test_a_metric_that_nobody_logged_is_an_error_that_names_those_there_are(run: Path) -> None:
    with pytest.raises(RunError, match="no step has the metric 'acc'") as caught:
        resolve_checkpoint("best:acc:max", run)
    assert ("found", "eval_loss") in caught.value.facts
    assert dcpconv("resolve", run, "best:acc:max").exit_code == 1
    for wanted in ("best:eval_loss", "best:", "best:eval_loss:least"):
        assert dcpconv("resolve", run, wanted).exit_code == 2


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e999", "-1e999", "NaN", '"0.1"', "true"])
def test_what_is_no_finite_number_is_never_the_best(value: str, run: Path) -> None:
    text = run_dirs.trainer_state(15, {"eval_loss": 0.125}).replace("0.125", value)
    write(run / "checkpoint-15", {"trainer_state.json": text})

    least, greatest = (resolve_checkpoint(f"best:eval_loss:{way}", run) for way in ("min", "max"))

    assert least is not None
    assert greatest is not None
    assert (least.step, greatest.step) == (10, 25)


@pytest.fixture
def minimind(tmp_path: Path) -> Path:
    for step, name in enumerate(("pretrain_512", "pretrain_768_moe", "full_sft_512", "dpo_512")):
        run_dirs.minimind(tmp_path / "checkpoints", step + 1, name=name)
    return tmp_path


RUNS = [
    ("full_sft", "full_sft_512"),
    ("dpo_512", "dpo_512"),
    ("pretrain_768_moe", "pretrain_768_moe"),
    ("dpo_512_resume.pth", "dpo_512"),
]


@pytest.mark.parametrize(("name", "file"), RUNS)
def test_one_of_several_runs(name: str, file: str, minimind: Path) -> None:
    path = minimind / "checkpoints" / f"{file}_resume.pth"

    found = find_latest_checkpoint(minimind, name)
    assert found is not None
    assert found.path == path
    for wanted in (f"latest {name}", f"auto  {name}"):
        found = resolve_checkpoint(wanted, minimind, verify=True)
        assert found is not None
        assert found.path == path
    assert dcpconv("latest", minimind, name).stdout == f"{path}\n"
    assert dcpconv("resolve", minimind, f"latest {name}").stdout == f"{path}\n"


@pytest.mark.parametrize("name", ["pre", "sft", "pretrain_5", "", "*", "full_sft_512.pth"])
def test_a_run_is_named_whole(name: str, minimind: Path) -> None:
    with pytest.raises(RunError):
        find_latest_checkpoint(minimind, name)


def test_several_widths_of_one_run_are_not_guessed(minimind: Path) -> None:
    with pytest.raises(WantedError) as caught:
        find_latest_checkpoint(minimind, "pretrain")

    found = [value for label, value in caught.value.facts if label == "found"]
    assert found == ["pretrain_512", "pretrain_768_moe"]


def test_a_run_with_other_steps_has_no_runs_of_that_name(run: Path) -> None:
    with pytest.raises(RunError, match="no run 'pretrain'"):
        resolve_checkpoint("auto pretrain", run)
    assert dcpconv("latest", run, "pretrain").exit_code == 1


def several_runs(base: Path) -> list[object]:
    for name in ("pretrain_512", "full_sft_512"):
        run_dirs.minimind(base / "my runs", 3, name=name)
    return ["latest", base / "my runs"]


def no_such_run(base: Path) -> list[object]:
    return [*several_runs(base), "dpo"]


def none_complete(base: Path) -> list[object]:
    (hf_trainer(base, 1) / "scheduler.pt").unlink()
    return ["resolve", base, "latest"]


def twice(base: Path) -> list[object]:
    hf_trainer(base, 1)
    run_dirs.torchtitan(base, 1)
    return ["resolve", base, "1"]


def incomplete(base: Path) -> list[object]:
    (hf_trainer(base, 1) / "scheduler.pt").unlink()
    return ["resolve", base, "1"]


def stripped(base: Path) -> list[object]:
    for step in (1, 2):
        hf_trainer(base, step)
    assert dcpconv("strip", base, "--yes").exit_code == 0
    return ["resolve", base, "1"]


def a_run_directory(base: Path) -> list[object]:
    hf_trainer(base / "a run", 1)
    return ["resolve", base, base / "a run"]


HINTED = [several_runs, no_such_run, none_complete, twice, incomplete, stripped, a_run_directory]


@pytest.mark.parametrize("make", HINTED, ids=lambda make: make.__name__)
def test_the_command_that_a_hint_names_works(
    make: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    asked = dcpconv(*make(tmp_path))
    assert asked.exit_code in {1, 2}

    (hint,) = [line for line in asked.stderr.splitlines() if line.startswith("  hint")]
    (command,) = re.findall(r"`dcpconv runs (.+?)`", hint)

    done = dcpconv(*shlex.split(command))
    assert done.exit_code == 0, done.output


def test_a_path_that_is_elsewhere_gets_a_hint_that_works(run: Path) -> None:
    with pytest.raises(DcpconvError) as caught:
        resolve_checkpoint("/content/drive/out/checkpoint-10", run)

    (path,) = re.findall(r"did you mean (.+)\?", caught.value.hint or "")
    assert dcpconv("resolve", run, path).exit_code == 0
