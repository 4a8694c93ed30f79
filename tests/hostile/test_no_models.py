"""Nothing that is no model becomes one, and a stranger is called what it is."""

from __future__ import annotations

import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from typer.testing import CliRunner

from dcpconv import convert, dcp_to_torch_save
from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.formats.opening import open_checkpoint
from support.checkpoints.check_cases import llama_shapes, write_hf


def rest_of_a_step(path: Path) -> None:
    path.mkdir()
    optimizer(path / "optimizer.pt")
    random_states(path / "rng_state.pth")
    torch.save({"last_epoch": 3}, path / "scheduler.pt")


def optimizer(path: Path) -> None:
    made = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    made.param_groups[0]["params"][0].grad = torch.ones(3)
    made.step()
    torch.save(made.state_dict(), path)


def random_states(path: Path) -> None:
    states = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    torch.save(states, path)


def arrays(path: Path, *, protocol: int = 2) -> None:
    state = {"a.weight": np.ones((2, 3), np.float32), "b.weight": np.zeros(4)}
    torch.save(state, path, pickle_protocol=protocol)


def objects(path: Path) -> None:
    torch.save({"step": 3, "name": "x"}, path)


def objects_in_a_dcp(path: Path) -> None:
    save({"step": 3, "args": {"lr": 0.1}}, checkpoint_id=path)


def nothing(path: Path) -> None:
    write_hf(path, {}, config=None)


NO_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "step": (rest_of_a_step, "only what goes beside a model"),
    "optimizer.pt": (optimizer, "the state of an optimizer"),
    "rng_state.pth": (random_states, "the random states of a run"),
    "arrays.pt": (arrays, "no weights"),
    "objects.pt": (objects, "no weights"),
    "dcp": (objects_in_a_dcp, "no weights"),
    "hf": (nothing, "no weights"),
}


@pytest.mark.parametrize("name", NO_MODELS)
@pytest.mark.parametrize("form", ["hf", "dcp", "torch"])
def test_no_result_without_weights(name: str, form: str, tmp_path: Path) -> None:
    write, reason = NO_MODELS[name]
    write(tmp_path / name)
    for command in (
        ["convert", str(tmp_path / name), str(tmp_path / "out"), "--form", form],
        ["check", str(tmp_path / name)],
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code in {1, 2}, found.output
        assert reason in found.output
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_get_a_hint_that_works(tmp_path: Path, protocol: int) -> None:
    arrays(tmp_path / "in.pt", protocol=protocol)
    with pytest.raises(DcpconvError, match="from_numpy"):
        convert(tmp_path / "in.pt", tmp_path / "out", form="hf")
    state = torch.load(tmp_path / "in.pt", weights_only=False)
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out", form="hf")


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of all of torch.jit, since 2.9
        program: Any = torch.jit.script(torch.nn.Linear(2, 3))
    program.save(str(path))


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "script": (script, "TorchScript"),
    "zip": (other_zip, "a zip file that torch.save did not write"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(2)), "NumPy"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a bare pickle"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\x03" + bytes(60)), "a GGUF file"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS"),
    "text": (lambda path: path.write_text("hello"), "neither zip nor pickle"),
    "short": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)), "without its directory"),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    write, what = STRANGERS[name]
    write(tmp_path / "model.pt")
    with pytest.raises(DcpconvError, match=what):
        open_checkpoint(tmp_path / "model.pt")


def hub_cache(path: Path) -> Path:
    return write_hf(path / "models--org--name/snapshots/abc", llama_shapes()).parents[1]


def run_of_hf_steps(path: Path) -> Path:
    for step in (10, 20):
        write_hf(path / f"run/checkpoint-{step}", llama_shapes())
    return path / "run"


def run_of_megatron(path: Path) -> Path:
    save({"w": torch.ones(2)}, checkpoint_id=path / "run/iter_0000010")
    (path / "run/latest_checkpointed_iteration.txt").write_text("10")
    return path / "run"


@pytest.mark.parametrize("make", [hub_cache, run_of_hf_steps, run_of_megatron])
def test_the_directory_a_hint_names_can_be_opened(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    tmp_path.joinpath("hub").mkdir()
    with pytest.raises(NotACheckpointError) as caught:
        open_checkpoint(make(tmp_path / "hub"))
    assert caught.value.hint is not None
    assert open_checkpoint(caught.value.hint.rpartition("such as ")[2]).tensors


def file_of_a_dcp(path: Path, name: str) -> Path:
    """One item in one file: by itself, a torch.save archive of a bare tensor."""
    save({"w": torch.ones(2)}, checkpoint_id=path / "dcp")
    return path / "dcp" / name


def file_beside_weights(path: Path, name: str) -> Path:
    return write_hf(path / "hf", llama_shapes()) / name


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (file_of_a_dcp, "__0_0.distcp"),
        (file_of_a_dcp, ".metadata"),
        (file_beside_weights, "config.json"),
    ],
)
def test_a_file_of_a_checkpoint_is_not_the_checkpoint(
    make: Callable[[Path, str], Path], name: str, tmp_path: Path
) -> None:
    with pytest.raises(NotACheckpointError) as caught:
        open_checkpoint(make(tmp_path, name))
    assert caught.value.hint is not None
    assert open_checkpoint(caught.value.hint.rpartition("name the directory: ")[2]).tensors


def test_torchs_own_drop_in_may_write_beside_its_source(tmp_path: Path) -> None:
    save({"model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "dcp")
    before = {path.name: path.read_bytes() for path in (tmp_path / "dcp").iterdir()}
    for _ in range(2):  # torch replaces what is there, and so do we
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "dcp/model.pt")
        assert torch.load(tmp_path / "dcp/model.pt")["model"]["w"].tolist() == [1, 1]
    with pytest.raises(DcpconvError):
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "dcp/.metadata")
    after = {path.name: path.read_bytes() for path in (tmp_path / "dcp").iterdir()}
    assert after.pop("model.pt")
    assert after == before
