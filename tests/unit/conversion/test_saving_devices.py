"""What is saved from a CUDA device, by a double: memory of this process that says it is elsewhere.

``tests/dist/test_cuda.py`` saves from a real one.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpconv.conversion.saving import runs, writing
from dcpconv.conversion.saving.runs import Losses, runs_of
from dcpconv.conversion.saving.shares import Share, Write
from dcpconv.core.outline import Loop, Part

CUDA = torch.device("cuda", 0)
TILE = 4096


class Elsewhere(Tensor):
    """A tensor whose memory nobody may take for this process's own."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every pinned buffer that is made; without a device none can be pinned."""
    made: list[Tensor] = []
    empty = torch.empty

    def noting(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        buffer: Tensor = empty(*args, **options)
        if pin_memory:
            made.append(buffer)
        return buffer

    monkeypatch.setattr(torch, "empty", noting)
    monkeypatch.setattr(runs, "TILE", TILE)
    return made


CASES = [
    pytest.param((67, 300), None, "float32", id="as it lies"),
    pytest.param((67, 300), None, "bfloat16", id="cast"),
    # (h p two) d -> (h two p) d, of 2 heads of 16 channels
    pytest.param((32, 300), (2, 8, 2), "float32", id="relabelled"),
    pytest.param((32, 300), (2, 8, 2), "bfloat16", id="relabelled and cast"),
]


def _write(shape: tuple[int, int], heads: tuple[int, int, int] | None, target: str) -> Write:
    rows, columns = shape
    loops: tuple[Loop, ...]
    if heads is None:
        loops = ((rows * columns, 1, 1),)
    else:
        count, pairs, two = heads
        loops = (
            (count, pairs * two * columns, pairs * two * columns),
            (pairs, two * columns, columns),
            (two, columns, pairs * columns),
            (columns, 1, 1),
        )
    return Write("x.safetensors", 128, 0, "float32", target, (Part("", 0, 0, loops),))


def _expected(held: Tensor, heads: tuple[int, int, int] | None, target: str) -> Tensor:
    if heads is not None:
        held = held.view(*heads, -1).transpose(1, 2).flatten(0, 2)
    return held.to(getattr(torch, target)).contiguous()


@pytest.mark.parametrize(("shape", "heads", "target"), CASES)
def test_bytes_go_through_pinned_tiles(
    shape: tuple[int, int],
    heads: tuple[int, int, int] | None,
    target: str,
    pinned: list[Tensor],
) -> None:
    torch.manual_seed(0)
    held = torch.randn(shape)
    write = _write(shape, heads, target)
    expected = _expected(held, heads, target)
    found = bytearray(128 + expected.nbytes)
    for run in runs_of(write, write.parts, held.as_subclass(Elsewhere), Losses()):
        found[run.offset : run.offset + len(run.data)] = run.data

    assert bytes(found[128:]) == expected.view(torch.uint8).numpy().tobytes()
    assert sum(buffer.numel() for buffer in pinned) == held.numel()  # each element comes over once
    assert max(buffer.nbytes for buffer in pinned) <= TILE
    assert all(type(buffer) is Tensor for buffer in pinned)


def test_what_the_callers_stream_is_at_is_waited_for(
    tmp_path: Path, pinned: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    stream = SimpleNamespace(synchronize=lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream if device else None)
    put = writing._put

    def noting(fd: int, run: runs.Run) -> None:
        done.append("written")
        put(fd, run)

    monkeypatch.setattr(writing, "_put", noting)
    held = torch.arange(600, dtype=torch.float32).view(2, 300)
    write = _write((2, 300), None, "float32")
    (tmp_path / write.file).write_bytes(bytes(128 + held.nbytes))
    report: Any = None
    share = Share(tmp_path, (write,), (), report)
    moved = held.as_subclass(Elsewhere)
    writing.write_share(share, item=lambda _: moved, jobs=1, progress=lambda _: None)

    assert done[0] == "waited"
    assert "written" in done[1:]
    assert (tmp_path / write.file).read_bytes()[128:] == held.numpy().tobytes()
    assert pinned
