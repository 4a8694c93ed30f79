"""Every hint is tried: the path or command that it names works on the input that led to it."""

from __future__ import annotations

import random
import re
import shlex
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from typer.testing import CliRunner

from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError
from dcpconv.formats.opening import open_checkpoint
from support.checkpoints.adapters import factors, peft_tensors, save_peft
from support.checkpoints.check_cases import llama_shapes, write_hf
from support.runs import run_dirs


def hub(path: Path) -> Path:
    write_hf(path / "models--org--name/snapshots/abc", llama_shapes())
    (path / "models--org--name/refs").mkdir()
    return path


def model_of_a_hub(path: Path) -> Path:
    return hub(path) / "models--org--name"


def run_of_trainer(path: Path) -> Path:
    for step in (9, 10):
        run_dirs.hf_trainer(path, step)
    return path


def run_of_lingua(path: Path) -> Path:
    return run_dirs.lingua(path / "checkpoints", 4).parents[1]


def run_of_verl(path: Path) -> Path:
    run_dirs.verl(path, 4)
    return path


def run_of_deepspeed_steps(path: Path) -> Path:
    for step in (4, 8):
        run_dirs.hf_zero(path, step, stage=3)
    return path


def zero_without_latest(path: Path) -> Path:
    run_dirs.zero(path, 4)
    run_dirs.zero(path, 8)
    (path / "latest").unlink()
    return path


def zero_with_a_stale_latest(path: Path) -> Path:
    run_dirs.zero(path, 4)
    (path / "latest").write_text("global_step9")
    return path


def run_of_megatron(path: Path) -> Path:
    save({"w": torch.ones(2)}, checkpoint_id=path / "iter_0000010")
    return path


def several_files(path: Path) -> Path:
    path.mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(2)}, path / name)
    return path


def one_rank_of_zero(path: Path) -> Path:
    return run_dirs.zero(path, 4, stage=3) / "zero_pp_rank_0_mp_rank_00_model_states.pt"


PATHS: list[Callable[[Path], Path]] = [
    hub,
    model_of_a_hub,
    run_of_trainer,
    run_of_lingua,
    run_of_verl,
    run_of_deepspeed_steps,
    zero_without_latest,
    zero_with_a_stale_latest,
    run_of_megatron,
    several_files,
    one_rank_of_zero,
]


@pytest.mark.parametrize("make", PATHS)
def test_the_path_that_a_hint_names_can_be_opened(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(DcpconvError) as caught:
        open_checkpoint(make(tmp_path / "in"))
    hint = caught.value.hint
    assert hint is not None
    named = re.findall(rf"{re.escape(str(tmp_path))}[^\s,;]*", hint)
    assert named, hint
    for path in named:
        assert open_checkpoint(path).tensors


def test_of_several_steps_the_newest_is_named(tmp_path: Path) -> None:
    with pytest.raises(DcpconvError, match=r"such as .*checkpoint-10"):
        open_checkpoint(run_of_trainer(tmp_path / "in"))


@pytest.fixture
def strange_class() -> Iterator[type]:
    """A class that no reader knows, for as long as a file of it is written and read."""
    module: Any = types.ModuleType("strange_module")
    kind = type("Strange", (), {"__module__": "strange_module"})
    module.Strange = kind
    sys.modules["strange_module"] = module
    yield kind
    del sys.modules["strange_module"]


def trusted_file(path: Path, kind: type) -> Path:
    path.mkdir()
    torch.save({"w": torch.ones(2), "cfg": kind()}, path / "a b.pth")
    return path / "a b.pth"


def trusted_directory(path: Path, kind: type) -> Path:
    return trusted_file(path, kind).parent


def trusted_bin(path: Path, kind: type) -> Path:
    trusted_file(path, kind).rename(path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("make", [trusted_file, trusted_directory, trusted_bin])
def test_trust_helps_where_a_hint_says_so(
    make: Callable[[Path, type], Path], strange_class: type, tmp_path: Path
) -> None:
    _try_command(make(tmp_path / "in", strange_class), tmp_path / "out", "--trust")


def legacy(path: Path, _: type) -> Path:
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    return path


def test_a_file_of_the_form_before_zip_is_read_as_its_hint_says(tmp_path: Path) -> None:
    _try_command(legacy(tmp_path / "old model.pt", object), tmp_path / "out", "--engine torch")


def test_an_adapter_is_merged_as_its_hint_says(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", llama_shapes())
    weights = {key: torch.ones(shape) for key, shape in llama_shapes().items()}
    save_peft(
        tmp_path / "in", peft_tensors(factors(weights, ["q_proj"])), target_modules=["q_proj"]
    )
    _try_command(tmp_path / "in", tmp_path / "out", "--adapter", BASE=str(base))


def _try_command(source: Path, target: Path, says: str, **names: str) -> None:
    """Runs the command in the hint of a conversion that was refused."""
    command = ["convert", str(source), str(target), "--form", "dcp"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code in {1, 2}, refused.output
    hint = refused.output.partition("hint")[2].strip()
    assert says in hint
    words = shlex.split(hint[hint.index("dcpconv ") :])[1:]
    names = {"DST": str(target), **names}
    done = CliRunner().invoke(app, [names.get(word, word) for word in words])
    assert done.exit_code == 0, done.output
    assert open_checkpoint(target).tensors


def ranks_of_strangers(path: Path, kind: type) -> Path:
    path.mkdir()
    for rank in (0, 1):
        state = {"w": torch.ones(2), "cfg": kind()}
        torch.save(state, path / f"model_world_size_2_rank_{rank}.pt")
    return path


def shards_of_strangers(path: Path, kind: type) -> Path:
    path.mkdir()
    torch.save({"w": torch.ones(2), "cfg": kind()}, path / "a.bin")
    (path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "a.bin"}}')
    return path


@pytest.mark.parametrize("make", [ranks_of_strangers, shards_of_strangers])
def test_trust_is_not_offered_where_it_cannot_help(
    make: Callable[[Path, type], Path], strange_class: type, tmp_path: Path
) -> None:
    with pytest.raises(DcpconvError) as caught:
        open_checkpoint(make(tmp_path / "in", strange_class))
    assert caught.value.hint == (
        "load it with the program that wrote it, and save a state_dict of tensors"
    )


def test_a_run_that_names_code_is_not_told_to_trust(strange_class: type, tmp_path: Path) -> None:
    run_dirs.hf_trainer(tmp_path, 4)
    step = tmp_path / "checkpoint-4"
    torch.save({"state": strange_class(), "param_groups": []}, step / "optimizer.pt")
    command = ["runs", "carry", str(step), str(tmp_path / "out"), "--to", "dcp"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 2, found.output
    assert "no code is run" in found.output
    assert "--trust" not in found.output


def megatron(path: Path) -> Path:
    (path / "iter_0000010/mp_rank_00").mkdir(parents=True)
    torch.save({"model": {}}, path / "iter_0000010/mp_rank_00/model_optim_rng.pt")
    return path


def script(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of all of torch.jit, since 2.9
        program: Any = torch.jit.script(torch.nn.Linear(2, 3))
    program.save(str(path))
    return path


def states(path: Path) -> Path:
    path.mkdir()
    held = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    for rank in (0, 1):
        torch.save(held, path / f"rng_state_{rank}.pth")
    return path


def without_metadata(path: Path) -> Path:
    save({"w": torch.ones(2)}, checkpoint_id=path)
    (path / ".metadata").unlink()
    return path


def zeros(path: Path) -> Path:
    path.write_bytes(bytes(600))
    return path


def gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(600))
    return path


def module(path: Path) -> Path:
    torch.save(torch.nn.Linear(2, 3), path)
    return path


SAID: list[tuple[Callable[[Path], Path], str]] = [
    (megatron, "its tools write torch_dist, which is a DCP"),
    (lambda path: megatron(path) / "iter_0000010", "its tools write torch_dist, which is a DCP"),
    (script, "torch.jit.load, and save its state_dict"),
    (states, "only what goes beside a model is here"),
    (without_metadata, "the save was interrupted, or that file was not copied"),
    (zeros, "the download or copy was interrupted"),
    (gguf, "gguf_file=NAME"),
    (module, "save model.state_dict"),
]
"""What no command of ours can do: the hint says who can."""


@pytest.mark.parametrize(("make", "says"), SAID)
def test_where_no_command_helps_the_hint_says_what_does(
    make: Callable[[Path], Path], says: str, tmp_path: Path
) -> None:
    with pytest.raises(DcpconvError) as caught:
        open_checkpoint(make(tmp_path / "in"))
    assert says in str(caught.value.hint)
    assert "--trust" not in str(caught.value.hint)


def test_random_states_are_not_offered_in_parts(tmp_path: Path) -> None:
    source = states(tmp_path / "in") / "rng_state_0.pth"
    command = ["convert", str(source), str(tmp_path / "out"), "--form", "dcp"]
    found = CliRunner().invoke(app, command)
    assert "the model lies in other files" in found.output
    assert "--only" not in found.output


def test_a_part_of_an_optimizer_can_be_taken_as_its_hint_says(tmp_path: Path) -> None:
    weights = {"a.weight": {"exp_avg": torch.ones(2)}}
    torch.save({"state": weights, "param_groups": [{"lr": 0.1}]}, tmp_path / "optimizer.pt")
    command = ["convert", str(tmp_path / "optimizer.pt"), str(tmp_path / "out"), "--form", "dcp"]
    refused = CliRunner().invoke(app, command)
    assert "--only KEY takes a part as it is" in refused.output
    done = CliRunner().invoke(app, [*command, "--only", "state"])
    assert done.exit_code == 0, done.output
    assert open_checkpoint(tmp_path / "out").tensors
