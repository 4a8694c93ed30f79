"""``--engine torch`` publishes nothing that the streaming engine would refuse."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from typer.testing import CliRunner

from dcpconv.cli.app import app


def optimizer(path: Path) -> None:
    made = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    made.param_groups[0]["params"][0].grad = torch.ones(3)
    made.step()
    torch.save(made.state_dict(), path)


def random_states(path: Path) -> None:
    torch.save({"python": random.getstate(), "cpu": torch.get_rng_state()}, path)


def random_states_of_accelerate(path: Path) -> None:
    states = {
        "step": 3,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.RandomState(3).get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    torch.save(states, path)


def random_states_of_verl(path: Path) -> None:
    torch.save({"lr_scheduler": None, "rng": {"cpu": torch.get_rng_state()}}, path)


def objects(path: Path) -> None:
    torch.save({"step": 3, "name": "x"}, path)


def objects_in_a_dcp(path: Path) -> None:
    save({"step": 3, "args": {"lr": 0.1}}, checkpoint_id=path)


def optimizer_in_a_dcp(path: Path) -> None:
    state = {"state": {"a": {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    save(state, checkpoint_id=path)


def empty(path: Path) -> None:
    torch.save({}, path)


NO_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "optimizer.pt": (optimizer, "the state of an optimizer"),
    "states.pth": (random_states, "the random states of a run"),
    "random_states_0.pkl": (random_states_of_accelerate, "the random states of a run"),
    "extra_state.pt": (random_states_of_verl, "the random states of a run"),
    "objects.pt": (objects, "no weights"),
    "dcp": (objects_in_a_dcp, "no weights"),
    "dcp-optimizer": (optimizer_in_a_dcp, "the state of an optimizer"),
    "empty.pt": (empty, "no weights"),
}


@pytest.mark.parametrize("engine", [[], ["--engine", "torch"], ["--engine", "torch", "--trust"]])
@pytest.mark.parametrize("name", NO_MODELS)
def test_no_engine_makes_a_model_of_what_is_none(
    name: str, engine: list[str], tmp_path: Path
) -> None:
    write, reason = NO_MODELS[name]
    write(tmp_path / name)
    form = "torch" if name.startswith("dcp") else "dcp"
    command = ["convert", str(tmp_path / name), str(tmp_path / "out"), "--form", form, *engine]
    found = CliRunner().invoke(app, command)
    assert found.exit_code in {1, 2}, found.output
    if "restricted unpickler refuses" not in found.output:  # NumPy's states, without trust
        assert reason in found.output
    assert [path.name for path in tmp_path.iterdir()] == [name]
