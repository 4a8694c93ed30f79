"""Disks without room: one error of the right kind, and nothing stays."""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dcpconv import convert
from dcpconv.cli.app import app
from dcpconv.core.errors import NoSpaceError
from support.checkpoints.check_cases import llama_shapes, write_hf
from support.machine.mounts import tmpfs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source", llama_shapes())


def fill(directory: Path) -> None:
    """Takes every byte, down to the last page."""
    with (directory / "filler").open("wb", buffering=0) as file:
        for piece in (1 << 16, 4096, 1):
            with pytest.raises(OSError, match="No space left"):
                _write_for_ever(file, bytes(piece))


def _write_for_ever(file: FileIO, piece: bytes) -> None:
    while True:
        file.write(piece)


@pytest.mark.parametrize("name", ["out", "out.pth", "new/deeper/out"])
def test_without_one_free_byte(source: Path, name: str, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "256k") as small:
        fill(small)
        found = CliRunner().invoke(app, ["convert", str(source), str(small / name)])
        left = [path.name for path in small.iterdir()]
    assert found.exit_code == 2
    assert "NoSpaceError" in found.stderr
    assert "may write" not in found.stderr
    assert left == ["filler"]


@pytest.mark.parametrize("free", [1, 4096, 5000, 20_000, 100_000])
def test_with_too_few_free_bytes(source: Path, free: int, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "256k") as small:
        fill(small)
        os.truncate(small / "filler", os.stat(small / "filler").st_size - free)  # noqa: PTH116
        with pytest.raises(NoSpaceError):
            convert(source, small / "out")
        left = [path.name for path in small.iterdir()]
    assert left == ["filler"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", range(3))
def test_where_no_directory_can_be_made(
    source: Path, number: int, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent, the staging directory, the result in it: each is a directory to be made."""
    make, calls = Path.mkdir, iter(range(10))

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.is_relative_to(tmp_path / "there") and next(calls) == call:
            raise OSError(number, os.strerror(number), str(path))
        make(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(NoSpaceError):
            convert(source, tmp_path / "there/out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
