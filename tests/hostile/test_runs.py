"""Run directories made to crash, stall or fool a tool that lists and deletes."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from dcpconv import find_checkpoints, resolve_checkpoint
from dcpconv.core.errors import DcpconvError
from dcpconv.runs import Best, Retention, prune, verify_checkpoints
from support.runs import run_dirs
from support.runs.run_dirs import hf_trainer, write

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
