"""How a rank writes what it holds: in strides that the disk starts on, into blocks found before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from dcpconv import save_weights
from dcpconv.conversion.saving import staged, writing
from dcpconv.core.errors import NoSpaceError
from dcpconv.engine.copying import reserve

MIB = 1 << 20


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(1500, 1500), torch.nn.Linear(7, 300))


def test_long_runs_are_written_stride_by_stride(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(model, tmp_path / "whole")
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(writing, "STRIDE", MIB)
    monkeypatch.setattr(
        writing, "write_back", lambda _, offset, nbytes: started.append((offset, nbytes))
    )
    save_weights(model, tmp_path / "strides", jobs=1)

    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "strides"))
    assert one.read_bytes() == other.read_bytes()
    assert sum(nbytes for _, nbytes in started) == sum(p.nbytes for p in model.parameters())
    assert max(nbytes for _, nbytes in started) == MIB
    # No write crosses a border at which another rank may be.
    assert all(offset // MIB == (offset + nbytes - 1) // MIB for offset, nbytes in started)


def test_a_file_has_its_blocks_before_anybody_writes(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def noting(fd: int, offset: int, nbytes: int) -> bool:
        assert (offset, nbytes) == (0, os.fstat(fd).st_size)
        asked.append(nbytes)
        return reserve(fd, offset, nbytes)

    monkeypatch.setattr(staged, "reserve", noting)
    save_weights(model, tmp_path / "out", max_file_size=4 * MIB)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert asked == sizes


def test_a_disk_that_has_no_blocks_is_told_before_anybody_writes(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staged, "reserve", full)
    with pytest.raises(NoSpaceError):
        save_weights(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
