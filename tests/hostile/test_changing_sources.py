"""A source that changes under a conversion: an error, and never a mixture of old and new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import CheckpointReader, convert
from dcpconv.core.errors import DcpconvError, SourceChangedError
from dcpconv.engine.execute import execute

CARRIES_OUT = "dcpconv.conversion.alone.execute"
SHAPES = {"a.weight": (300, 40), "b.weight": (40, 300), "c.bias": (70,)}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {key: torch.full(shape, value) for key, shape in SHAPES.items()}


def write_hf(path: Path, value: float) -> None:
    path.mkdir(exist_ok=True)
    save_file(tensors(value), path / "model.safetensors")


def write_torch(path: Path, value: float) -> None:
    path.mkdir(exist_ok=True)
    torch.save(tensors(value), path / "model.pth")


def write_dcp(path: Path, value: float) -> None:
    save(dict(tensors(value)), checkpoint_id=path)


FORMS: dict[str, tuple[Callable[[Path, float], None], str]] = {
    "hf": (write_hf, "model.safetensors"),
    "torch": (write_torch, "model.pth"),
    "dcp": (write_dcp, "__0_0.distcp"),
}


def rewrite(old: Path, new: Path) -> None:
    """The same file, with other bytes of the same length."""
    data = new.read_bytes()
    with old.open("r+b") as file:
        file.write(data)
    # A rewrite within the grain of the clock would not be told apart; none takes that little.
    os.utime(old, ns=(0, old.stat().st_mtime_ns + 1_000_000))


def rename_over(old: Path, new: Path) -> None:
    """Another file of the same length and time under the same name."""
    state = old.stat()
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    new.replace(old)


def touch(old: Path, _new: Path) -> None:
    os.utime(old, ns=(0, old.stat().st_mtime_ns + 1_000_000))


def lengthen(old: Path, _new: Path) -> None:
    state = old.stat()
    with old.open("ab") as file:
        file.write(b"\0")
    os.utime(old, ns=(state.st_atime_ns, state.st_mtime_ns))


def lose(old: Path, _new: Path) -> None:
    old.unlink()


CHANGES = [rewrite, rename_over, touch, lengthen, lose]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def both(tmp_path: Path, form: str) -> tuple[Path, Path, Path]:
    """A source, the file of it that changes, and what it becomes."""
    write, name = FORMS[form]
    source, other = tmp_path / "source", tmp_path / "other"
    write(source, 1.0)
    write(other, 2.0)
    assert (source / name).stat().st_size == (other / name).stat().st_size
    return source, source / name, other / name


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("target", ["out.pth", "out"])
def test_a_change_after_planning_is_an_error(
    form: str,
    target: str,
    change: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, old, new = both(tmp_path, form)

    def late(*args: Any, **kwargs: Any) -> Any:
        change(old, new)
        return execute(*args, **kwargs)

    monkeypatch.setattr(CARRIES_OUT, late)
    with pytest.raises(DcpconvError) as caught:
        convert(source, tmp_path / target, dtype="fp16" if target == "out" else None)
    assert str(old) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_bytes_move_is_an_error(
    form: str, change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    source, old, new = both(tmp_path, form)
    once = iter([(old, new)])

    def meanwhile(_: object) -> None:
        for files in once:
            change(*files)

    with pytest.raises(DcpconvError) as caught:
        convert(source, tmp_path / "out", form="dcp", jobs=1, progress=meanwhile)
    assert str(old) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source"]


def test_a_change_of_what_names_the_files_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, _ = both(tmp_path, "dcp")

    def late(*args: Any, **kwargs: Any) -> Any:
        touch(source / ".metadata", source)
        return execute(*args, **kwargs)

    monkeypatch.setattr(CARRIES_OUT, late)
    with pytest.raises(SourceChangedError, match="was written to"):
        convert(source, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("name", ["torch", "dcp"])
def test_torchs_own_functions_are_watched_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcpconv.conversion import torch_engine

    source, old, new = both(tmp_path, name)
    source = old if name == "torch" else source
    reading = "_load_file" if name == "torch" else "_load_directory"
    read = getattr(torch_engine, reading)

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        state = read(*args, **kwargs)
        rename_over(old, new)
        return state

    monkeypatch.setattr(torch_engine, reading, meanwhile)
    with pytest.raises(SourceChangedError, match="another file has its name"):
        convert(source, tmp_path / ("out" if name == "torch" else "out.pth"), engine="torch")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_an_old_result_stays_when_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old, new = both(tmp_path, "hf")
    convert(source, tmp_path / "out.pth")
    before = (tmp_path / "out.pth").read_bytes()

    def late(*args: Any, **kwargs: Any) -> Any:
        rename_over(old, new)
        return execute(*args, **kwargs)

    monkeypatch.setattr(CARRIES_OUT, late)
    with pytest.raises(SourceChangedError, match="another file has its name"):
        convert(source, tmp_path / "out.pth", overwrite=True)
    assert (tmp_path / "out.pth").read_bytes() == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_reader_that_was_opened_before_says_so(
    form: str, change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    source, old, new = both(tmp_path, form)

    class Late(CheckpointReader):
        def prepare_local_plan(self, plan: Any) -> Any:
            change(old, new)
            return super().prepare_local_plan(plan)

    state = tensors(0.0)
    with pytest.raises((DcpconvError, CheckpointException)) as caught:
        load(dict(state), storage_reader=Late(source))
    assert str(old) in str(caught.value)


def test_an_unchanged_source_may_be_read_by_others(tmp_path: Path) -> None:
    """A second name and a new time of access are no change."""
    source, old, _ = both(tmp_path, "hf")

    def meanwhile(_: object) -> None:
        shutil.rmtree(tmp_path / "linked", ignore_errors=True)
        (tmp_path / "linked").mkdir()
        os.link(old, tmp_path / "linked/model.safetensors")
        os.utime(old, ns=(0, old.stat().st_mtime_ns))

    convert(source, tmp_path / "out.pth", progress=meanwhile)
    assert torch.load(tmp_path / "out.pth")["c.bias"].tolist() == [1.0] * 70
