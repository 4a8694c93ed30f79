"""A few KiB tell two checkpoints of one shape apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dcpconv.formats.opening import open_checkpoint
from dcpconv.loading.sampling import sample


def saved(directory: Path, *, changed: str = "") -> Path:
    """Twelve tensors of 400 KB in two files; ``changed`` has another value everywhere."""
    directory.mkdir()
    weights = {f"layers.{n}.weight": torch.full((100, 1000), float(n)) for n in range(12)}
    if changed:
        weights[changed] = weights[changed] + 1
    for number in range(2):
        keys = [key for key in weights if int(key.split(".")[1]) % 2 == number]
        save_file({key: weights[key] for key in keys}, directory / f"model-{number}.safetensors")
    return directory


def test_the_same_files_give_the_same_samples(tmp_path: Path) -> None:
    first = sample(open_checkpoint(saved(tmp_path / "a")))
    assert first == sample(open_checkpoint(saved(tmp_path / "b")))
    assert [one.file for one in first] == ["model-0.safetensors", "model-1.safetensors"]


@pytest.mark.parametrize("number", range(12))
def test_one_changed_tensor_changes_its_file(tmp_path: Path, number: int) -> None:
    before = sample(open_checkpoint(saved(tmp_path / "a")))
    changed = saved(tmp_path / "b", changed=f"layers.{number}.weight")
    after = sample(open_checkpoint(changed))
    differing = [old.file for old, new in zip(before, after, strict=True) if old != new]
    assert differing == [f"model-{number % 2}.safetensors"]


def test_a_file_whose_second_half_is_a_hole_is_told(tmp_path: Path) -> None:
    before = sample(open_checkpoint(saved(tmp_path / "a")))
    directory = saved(tmp_path / "b")
    file = directory / "model-1.safetensors"
    nbytes = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(nbytes // 2)
        opened.truncate(nbytes)
    after = sample(open_checkpoint(directory))
    assert before[0] == after[0]
    assert (before[1].nbytes, before[1].digest != after[1].digest) == (after[1].nbytes, True)


def test_few_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = open_checkpoint(saved(tmp_path / "a"))
    read: list[int] = []
    pread = os.pread

    def count(fd: int, nbytes: int, offset: int) -> bytes:
        read.append(nbytes)
        return pread(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", count)
    sample(catalog)
    assert sum(read) <= 8 << 10
