"""Steps are told by their whole names, ordered by number, and complete or not for a reason."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import find_checkpoints, find_latest_checkpoint
from dcpconv.core.errors import DcpconvError, NotACheckpointError
from support.runs import run_dirs
from support.runs.run_dirs import MAKERS, hf_trainer, safetensors, saved, write


@pytest.mark.parametrize("layout", MAKERS)
def test_every_layout_is_found_complete_and_in_order_of_numbers(
    layout: str, tmp_path: Path
) -> None:
    for step in (9, 1000, 200):
        MAKERS[layout](tmp_path, step)

    steps = find_checkpoints(tmp_path)

    assert [step.step for step in steps] == [9, 200, 1000]
    assert [step.problems for step in steps] == [(), (), ()]
    named = layout.partition(" ")[0].replace("hf-fsdp", "hf-trainer")
    assert {step.layout for step in steps} == {named}
    assert find_latest_checkpoint(tmp_path) == steps[-1]


HOLDS = [
    pytest.param("hf-trainer", "hf", "", "weights optimizer scheduler rng trainer_state"),
    pytest.param(
        "hf-fsdp", "dcp", "pytorch_model_fsdp_0", "weights optimizer scheduler rng trainer_state"
    ),
    pytest.param("lingua", "dcp", "", "weights optimizer scheduler trainer_state"),
    pytest.param("torchtitan", "dcp", "", "weights optimizer scheduler trainer_state"),
    pytest.param("accelerate", "hf", "", "weights optimizer scheduler rng"),
]


@pytest.mark.parametrize(("layout", "form", "weights", "holds"), HOLDS)
def test_a_step_says_what_it_holds(
    layout: str, form: str, weights: str, holds: str, tmp_path: Path
) -> None:
    path = MAKERS[layout](tmp_path, 5)

    (step,) = find_checkpoints(tmp_path)

    assert (step.form, step.path, step.weights) == (form, path, path / weights)
    assert step.holds == tuple(name.replace("_", " ") for name in holds.split())
    files = [file for file in path.rglob("*") if file.is_file()]
    assert step.nbytes == sum(file.stat().st_size for file in files)
    assert step.modified == max(file.stat().st_mtime for file in files)


MISNAMED = [
    "checkpoint-500.tmp",
    "checkpoint-500-merged",
    "checkpoint-500.zip",
    "checkpoint-best",
    "checkpoint-",
    "checkpoint--5",
    "checkpoint-5 ",
    "checkpoint-\u0663",
    "Checkpoint-500",
    ".ipynb_checkpoints",
    ".checkpoint-500.dcpconv-trash",
    "tmp-checkpoint-500",
    "0000001000_v7",
    "00000030005",
    "000000100",
    "step-",
    "step-1000.tmp",
    "checkpoint_last",
    "checkpoint-" + "9" * 5000,
    "pretrain_512_resume.pth.tmp",
    "_resume.pth",
]


def test_misnamed_directories_neither_count_nor_crash(tmp_path: Path) -> None:
    good = hf_trainer(tmp_path, 500)
    for name in MISNAMED:
        if len(name) < 255:
            shutil.copytree(good, tmp_path / name)
    write(tmp_path, {"checkpoint-900": "a file with a step's name", "trainer_state.json": "{}"})

    assert [step.path for step in find_checkpoints(tmp_path)] == [good]


@pytest.mark.parametrize("name", MISNAMED)
def test_no_misnamed_directory_is_a_step_by_its_name(name: str) -> None:
    from dcpconv.runs.layouts import is_minimind_name, layout_of

    assert layout_of(name) is None
    assert not is_minimind_name(name)


BREAKS = [
    ("hf-trainer", "trainer_state.json", None, "no trainer_state.json"),
    ("hf-trainer", "trainer_state.json", '{"global_step": 5', "trainer_state.json was cut short"),
    ("hf-trainer", "model.safetensors", None, "no weights"),
    ("hf-trainer", "model.safetensors", "", "model.safetensors is empty"),
    ("hf-trainer", "scheduler.pt", None, "no scheduler.pt"),
    ("hf-trainer", "optimizer.pt", None, "no optimizer"),
    ("hf-trainer", "checkpoint-is-incomplete.txt", "x", "checkpoint-is-incomplete.txt"),
    ("hf-fsdp", "pytorch_model_fsdp_0/.metadata", None, "no pytorch_model_fsdp_0/.metadata"),
    ("hf-fsdp", "optimizer_0/.metadata", None, "no optimizer_0/.metadata"),
    ("hf-fsdp", "pytorch_model_fsdp_0/__1_0.distcp", None, "__1_0.distcp is missing"),
    ("hf-fsdp", "rng_state_1.pth", None, "rng_state_1.pth is missing"),
    ("hf-fsdp", "rng_state_0.pth", None, "rng_state_0.pth is missing"),
    ("lingua", ".metadata", None, "no .metadata"),
    ("lingua", "params.json", None, "no params.json"),
    ("lingua", "params.json", '{"distributed": {"dp_sh', "params.json was cut short"),
    ("lingua", "train_state_00001.json", None, "train_state_00001.json is missing"),
    ("lingua", "train_state_00000.json", '{"step"', "train_state_00000.json was cut short"),
    ("lingua", "__1_0.distcp", None, "__1_0.distcp is missing"),
    ("torchtitan", ".metadata", None, "no .metadata"),
    ("torchtitan", "__0_0.distcp", None, "__0_0.distcp is missing"),
    ("accelerate", "model.safetensors", None, "no weights"),
    ("accelerate", "random_states_0.pkl", None, "random_states_0.pkl is missing"),
]


@pytest.mark.parametrize(
    ("layout", "file", "content", "why"), BREAKS, ids=[f"{row[0]}: {row[3]}" for row in BREAKS]
)
def test_an_incomplete_step_is_skipped_with_the_reason(
    layout: str, file: str, content: str | None, why: str, tmp_path: Path
) -> None:
    older, newer = (MAKERS[layout](tmp_path, step) for step in (100, 200))
    if content is None:
        (newer / file).unlink()
    else:
        (newer / file).write_text(content)

    incomplete = find_checkpoints(tmp_path)[1]
    latest = find_latest_checkpoint(tmp_path)

    assert not incomplete.is_complete
    assert any(why in problem for problem in incomplete.problems), incomplete.problems
    assert latest is not None
    assert latest.path == older


def test_all_shard_files_of_an_index_must_be_there(tmp_path: Path) -> None:
    path = hf_trainer(tmp_path, 5)
    (path / "model.safetensors").unlink()
    one, two = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    index = json.dumps({"weight_map": {"a": one, "b": two}})
    write(path, {"model.safetensors.index.json": index, one: safetensors()})

    assert find_checkpoints(tmp_path)[0].problems == (f"{two} is missing",)

    write(path, {two: safetensors()})
    assert find_checkpoints(tmp_path)[0].is_complete


def test_one_process_of_several_left_its_random_state(tmp_path: Path) -> None:
    path = hf_trainer(tmp_path, 5)
    (path / "rng_state.pth").rename(path / "rng_state_0.pth")

    assert find_checkpoints(tmp_path)[0].problems == ("rng_state_1.pth is missing",)


def test_weights_alone_are_a_complete_step_that_says_so(tmp_path: Path) -> None:
    path = hf_trainer(tmp_path, 5)  # save_only_model=True
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).unlink()

    (step,) = find_checkpoints(tmp_path)

    assert step.is_complete
    assert step.holds == ("weights", "trainer state")


def test_adapters_count_as_weights_also_in_directories_of_their_own(tmp_path: Path) -> None:
    files = {"adapter_model.safetensors": safetensors(), "default/adapter_model.bin": saved()}
    for step, name in enumerate(files):
        path = hf_trainer(tmp_path, step)
        (path / "model.safetensors").unlink()
        write(path, {name: files[name]})

    steps = find_checkpoints(tmp_path)

    assert all(step.is_complete for step in steps)
    assert {step.holds[0] for step in steps} == {"adapter"}
    assert not any("weights" in step.holds for step in steps)


def test_a_minimind_file_says_its_epoch_and_step(tmp_path: Path) -> None:
    path = run_dirs.minimind(tmp_path, 40, epoch=2)

    (step,) = find_checkpoints(tmp_path)

    assert (step.path, step.layout, step.form) == (path, "minimind", "torch")
    assert (step.epoch, step.step, step.problems) == (2, 40, ())
    assert step.holds == ("weights", "optimizer", "scaler", "trainer state")


@pytest.mark.parametrize("keep", [0.1, 0.6, 0.95])
def test_a_minimind_file_that_was_cut_short_is_incomplete(keep: float, tmp_path: Path) -> None:
    path = run_dirs.minimind(tmp_path, 40)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])

    (step,) = find_checkpoints(tmp_path)

    assert not step.is_complete
    assert find_latest_checkpoint(tmp_path) is None


def test_minimind_files_of_two_runs_have_no_latest(tmp_path: Path) -> None:
    run_dirs.minimind(tmp_path, 40, name="pretrain_96")
    run_dirs.minimind(tmp_path, 10, name="full_sft_96")

    assert len(find_checkpoints(tmp_path)) == 2
    with pytest.raises(DcpconvError, match="several runs"):
        find_latest_checkpoint(tmp_path)


@pytest.mark.parametrize("inner", ["checkpoints", "checkpoint"])
def test_steps_are_also_found_where_trainers_put_them_inside(inner: str, tmp_path: Path) -> None:
    path = run_dirs.lingua(tmp_path / inner, 7)

    assert [step.path for step in find_checkpoints(tmp_path)] == [path]


def test_a_run_that_has_not_begun_has_no_steps(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "absent") == ()
    assert find_latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "file").touch()
    with pytest.raises(NotACheckpointError):
        find_checkpoints(tmp_path / "file")


def test_times_do_not_decide(tmp_path: Path) -> None:
    for step, modified in ((10, 3e8), (9, 9e8), (11, 1e8)):
        for file in hf_trainer(tmp_path, step).iterdir():
            os.utime(file, (modified, modified))

    assert [step.step for step in find_checkpoints(tmp_path)] == [9, 10, 11]


class Counted:
    """Calls of the system that a listing makes, and the bytes that it reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.nbytes = 0
        for name in ("scandir", "open", "pread", "stat"):
            monkeypatch.setattr(os, name, self._count(name, getattr(os, name)))

    def _count(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            found = function(*args, **kwargs)
            self.nbytes += len(found) if name == "pread" else 0
            return found

        return call


@pytest.mark.parametrize("layout", MAKERS)
def test_the_cost_of_a_step_does_not_grow_with_their_number(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = []
    for several in (5, 10, 20):
        run = tmp_path / str(several)
        for step in range(1, several + 1):
            MAKERS[layout](run, step)
        with monkeypatch.context() as patch:
            counted = Counted(patch)
            steps = find_checkpoints(run)
        assert all(step.is_complete for step in steps)
        costs.append((*(counted.calls[name] for name in counted.calls), counted.nbytes))
        files = sum(1 for path in (run / steps[0].path.name).rglob("*") if path.is_file())
        assert counted.calls["open"] <= several * (files + 3)
        assert counted.calls["pread"] <= several * files * 8
        directories = 1 + sum(1 for path in steps[0].path.rglob("*") if path.is_dir())
        assert counted.calls["scandir"] == 1 + several * directories

    first, second, third = (dict(enumerate(cost)) for cost in costs)
    for index in first:  # what comes with each step comes as often again with twice as many
        assert third[index] - second[index] == 2 * (second[index] - first[index])


def test_of_a_large_file_only_the_ends_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hf_trainer(tmp_path, 1)
    numel = 1 << 28  # a gibibyte, most of it a hole
    torch.save({"w": torch.zeros(2)}, path / "scheduler.pt")
    header = json.dumps({"w": {"dtype": "F32", "shape": [numel], "data_offsets": [0, 4 * numel]}})
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 4 * numel)
    with (path / "optimizer.pt").open("r+b") as file:
        file.truncate(1 << 30)
    counted = Counted(monkeypatch)

    (step,) = find_checkpoints(tmp_path)

    assert step.problems == ("optimizer.pt: file has no zip directory at its end",)
    assert counted.nbytes < 1 << 19
