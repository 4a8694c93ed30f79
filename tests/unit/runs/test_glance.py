"""Every look at a step sees a file whose bytes are not of the form that its name promises."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcpconv import find_checkpoints, find_latest_checkpoint
from dcpconv.runs import verify_checkpoints
from support.runs.run_dirs import MAKERS, hf_trainer, safetensors, saved, write

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda data: bytes(len(data)),
    "a third": lambda data: data[: len(data) // 3],
    "all but the last byte": lambda data: data[:-1],
    "another file": lambda data: b"<!DOCTYPE html><html>404</html>" * (len(data) // 30),
    "four bytes": lambda data: data[:4],
    "no beginning": lambda data: bytes(16) + data[16:],
}
FILES = [
    ("hf-trainer", "model.safetensors"),
    ("hf-trainer", "optimizer.pt"),
    ("hf-trainer", "scheduler.pt"),
    ("hf-trainer", "rng_state.pth"),
    ("hf-fsdp", "rng_state_1.pth"),
    ("accelerate", "optimizer.bin"),
    ("accelerate", "random_states_1.pkl"),
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("layout", "name"), FILES)
def test_a_damaged_file_is_named_and_the_step_passed_over(
    layout: str, name: str, damage: str, tmp_path: Path
) -> None:
    older, newer = (MAKERS[layout](tmp_path, step) for step in (1, 2))
    (newer / name).write_bytes(DAMAGE[damage]((newer / name).read_bytes()))

    listed = find_checkpoints(tmp_path)[1]
    latest = find_latest_checkpoint(tmp_path)
    checked = list(verify_checkpoints(tmp_path))[1]

    assert any(problem.startswith(f"{name}: ") for problem in listed.problems), listed.problems
    assert set(listed.problems) <= set(checked.problems)
    assert latest is not None
    assert latest.path == older


def test_whole_files_of_every_kind_pass(tmp_path: Path) -> None:
    path = hf_trainer(tmp_path, 1)
    torch.save({"a": 1}, path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save([torch.ones(5)] * 2000, path / "scaler.pt")
    write(path, {"tool.bin": "some other tool's", "notes.pkl": "text", "tokenizer.model": b"\0"})

    assert find_checkpoints(tmp_path)[0].problems == ()


def test_verify_takes_every_bin_for_what_its_name_says(tmp_path: Path) -> None:
    write(hf_trainer(tmp_path, 1), {"more.bin": bytes(100)})

    (checked,) = verify_checkpoints(tmp_path)

    assert checked.problems == ("more.bin: is zeros at its beginning",)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("key", ["lm_head.weight", "a.lora_A.weight", "x.lora_B", "q.bias", "bias"])
def test_parameters_that_stage_3_left_empty(name: str, key: str, tmp_path: Path) -> None:
    older, newer = (hf_trainer(tmp_path, step) for step in (1, 2))
    (newer / "model.safetensors").unlink()
    write(newer, {name: safetensors(**{key: torch.empty(0), "norm.weight": torch.ones(2)})})

    problem = f"{name}: {key} has no elements: saved under ZeRO-3 without gathering"
    assert find_checkpoints(tmp_path)[1].problems == (problem,)
    latest = find_latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.path == older


def test_peft_writes_what_stage_3_left_empty(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs .[interop]")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    adapted.save_pretrained(tmp_path / "whole")
    for parameter in adapted.parameters():
        parameter.data = torch.empty(0)
    with pytest.warns(peft.utils.warning.PeftWarning):  # which is all that the user sees
        adapted.save_pretrained(tmp_path / "empty")
    found = []
    for number, name in enumerate(("whole", "empty")):
        path = hf_trainer(tmp_path / "run", number)
        (path / "model.safetensors").unlink()
        for file in (tmp_path / name).iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        found.append(find_checkpoints(tmp_path / "run")[number])

    assert found[0].problems == ()
    assert found[0].holds[0] == "adapter"
    assert [p for p in found[1].problems if "lora_A.weight and 1 more have no elements" in p]


def test_what_a_pickle_says_stage_3_left_empty_is_seen_by_verify(tmp_path: Path) -> None:
    path = hf_trainer(tmp_path, 1)
    (path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.empty(0)}, path / "pytorch_model.bin")

    (checked,) = verify_checkpoints(tmp_path)

    assert checked.problems == (
        "lm_head.weight has no elements: saved under ZeRO-3 without gathering",
    )


def test_buffers_may_be_empty(tmp_path: Path) -> None:
    tensors = {"q.g_idx": torch.empty(0), "q.weight": torch.ones(2), "r.weight": torch.ones(0, 4)}
    write(hf_trainer(tmp_path, 1), {"model.safetensors": safetensors(**tensors)})

    (checked,) = verify_checkpoints(tmp_path)

    assert checked.problems == ()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "x.pt"]
)
@pytest.mark.parametrize("kind", ["pipe", "zeros without end"])
def test_only_regular_files_are_opened(name: str, kind: str, tmp_path: Path) -> None:
    older, newer = (hf_trainer(tmp_path, step) for step in (1, 2))
    (newer / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(newer / name)
    else:
        (newer / name).symlink_to("/dev/zero")

    assert f"{name} is no regular file" in find_checkpoints(tmp_path)[1].problems
    assert f"{name} is no regular file" in list(verify_checkpoints(tmp_path))[1].problems
    latest = find_latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.path == older


def test_saved_is_what_the_tests_take_for_whole() -> None:
    assert saved().startswith(b"PK")
