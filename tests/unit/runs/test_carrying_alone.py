"""What carrying a run says, and what it refuses and leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from typer.testing import CliRunner

from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError, FormatError, NotACheckpointError
from dcpconv.runs.carrying import convert_run, read_training_state
from support.runs.carried import hf_trainer, minimind


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    minimind(tmp_path / "a_resume.pth", "gen3")

    report = convert_run(tmp_path / "a_resume.pth", tmp_path / "out", to="dcp", dry_run=True)

    assert report.is_dry_run
    assert [path.name for path in tmp_path.iterdir()] == ["a_resume.pth"]
    json.dumps(report.to_json())


class Boom:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    minimind(tmp_path / "a_resume.pth", "gen3", scheduler=Boom(mark))

    with pytest.raises(FormatError, match="not on the allow-list"):
        read_training_state(tmp_path / "a_resume.pth")
    assert not mark.exists()


def test_what_is_no_training_checkpoint_is_told(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "weights.pth")
    save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "dcp")
    hf_trainer(tmp_path / "checkpoint-7", "llama")
    (tmp_path / "checkpoint-7" / "optimizer.pt").unlink()

    for name in ("weights.pth", "dcp", "checkpoint-7", "."):
        with pytest.raises(NotACheckpointError):
            read_training_state(tmp_path / name)
    with pytest.raises(DcpconvError, match="no trainer 'keras'"):
        convert_run(tmp_path / "weights.pth", tmp_path / "out", to="keras")  # type: ignore[arg-type]


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    minimind(tmp_path / "a_resume.pth", "gen3", step=40, world_size=2)
    words = ["runs", "carry", str(tmp_path / "a_resume.pth"), str(tmp_path / "out"), "--to", "dcp"]

    result = CliRunner().invoke(app, [*words, "--world-size", "4"])

    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["source", "minimind", "minimind3"]
    assert lines[1].split()[:3] == ["target", "dcp", "minimind3"]
    assert lines[2:4] == [
        "weights   30 tensors, 0 relabelled",
        "optimizer step, exp_avg, exp_avg_sq of 29 parameters",
    ]
    assert "note: step 40 of 2 ranks became step 20 of 4 ranks" in result.stderr
    assert CliRunner().invoke(app, words).exit_code == 2  # the target exists
