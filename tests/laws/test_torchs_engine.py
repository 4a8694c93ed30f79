"""The engine that is torch's own converter: what it alone reads, and the promises it keeps."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import _extension
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import convert
from dcpconv.cli import app
from dcpconv.core.errors import DcpconvError, FormatError
from support.checkpoints.states import ENGINES, assert_same, flat, loaded, random, training
from support.checkpoints.stock import nested_of_dcp


@pytest.mark.parametrize("suffix", ["to-dcp", "to-hf", "to-pth"])
def test_the_form_before_zip_archives_goes_through_torch(tmp_path: Path, suffix: str) -> None:
    state = {"model": {"a": random(5, 3), "n": torch.arange(3)}, "step": 7}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)

    with pytest.raises(FormatError, match="before version") as caught:
        convert(tmp_path / "old.pth", tmp_path / "out")
    assert "--engine torch" in (caught.value.hint or "")
    with pytest.raises(FormatError, match="before version") as caught:
        convert(tmp_path / "old.pth", tmp_path / "out", engine="torch", dry_run=True)
    assert "leave --dry-run out" in (caught.value.hint or "")

    if suffix == "to-dcp":
        convert(tmp_path / "old.pth", tmp_path / "out", engine="torch")
        assert_same(nested_of_dcp(tmp_path / "out"), state)
    elif suffix == "to-pth":
        convert(tmp_path / "old.pth", tmp_path / "out.pth", engine="torch")
        assert_same(loaded(tmp_path / "out.pth"), state)
    else:
        convert(tmp_path / "old.pth", tmp_path / "out", engine="torch", form="hf")
        from safetensors.torch import load_file

        found = load_file(tmp_path / "out/model.safetensors")
        assert_same(dict(sorted(found.items())), state["model"])
    assert {path.name for path in tmp_path.iterdir()} <= {"old.pth", "out", "out.pth"}


class _Reversing(_extension.StreamTransformExtension):
    """Stands in for compression, whose library is not everywhere."""

    @staticmethod
    def from_descriptor(version: str) -> _Reversing:
        del version
        return _Reversing()

    @staticmethod
    def registry_name() -> str:
        return "stream.zstd"

    def get_descriptor(self) -> str:
        return "stream.zstd/1"

    def transform_to(self, output: Any) -> Any:
        return _Negated(output)

    def transform_from(self, input: Any) -> Any:  # noqa: A002 - torch's name
        return io.BytesIO(_negative(input.read()))


class _Negated:
    def __init__(self, output: Any) -> None:
        self._output = output

    def write(self, data: bytes) -> int:
        return int(self._output.write(_negative(bytes(data))))

    def flush(self) -> None:
        self._output.flush()

    def close(self) -> None:
        self._output.flush()


def _negative(data: bytes) -> bytes:
    return bytes(byte ^ 255 for byte in data)


def test_transformed_items_go_through_torch_where_they_cannot_be_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"model": {"a": random(5, 3)}, "step": 7}
    writer = FileSystemWriter(tmp_path / "dcp", _extensions=[_Reversing()])
    save(state, storage_writer=writer)

    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(FormatError, match="compressed or otherwise transformed") as caught:
            convert(tmp_path / "dcp", tmp_path / "out.pth")
    assert "pip install zstandard" in (caught.value.hint or "")

    monkeypatch.setattr(_extension, "ZStandard", _Reversing)
    convert(tmp_path / "dcp", tmp_path / "out.pth", engine="torch")
    assert_same(loaded(tmp_path / "out.pth"), state)


class _Planted:
    """Leaves a file where it was unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["torch", "dcp", ".metadata"])
def test_code_in_a_pickle_runs_only_with_trust(tmp_path: Path, form: str) -> None:
    mark = tmp_path / "ran"
    state = {"model": {"a": random(2, 2)}, "extra": _Planted(mark)}
    source, target = tmp_path / "source", tmp_path / "out"
    if form == "torch":
        source = tmp_path / "source.pth"
        torch.save(state, source)
    else:
        save(
            state if form == "dcp" else {"model": state["model"]},
            checkpoint_id=source,
        )
        target = tmp_path / "out.pth"
    if form == ".metadata":
        import pickle

        file = source / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        metadata.planner_data["x"] = _Planted(mark)
        file.write_bytes(pickle.dumps(metadata))
    assert not mark.exists()

    for engine in ENGINES:
        with pytest.raises(FormatError) as caught:
            convert(source, target, engine=engine)
        assert "--engine torch --trust" in (caught.value.hint or "")
        assert not mark.exists()
        assert not target.exists()
    with pytest.raises(DcpconvError, match="only torch itself"):
        convert(source, target, trust=True)

    convert(source, target, engine="torch", trust=True)
    assert mark.exists()
    assert target.exists()


def test_torchs_engine_keeps_the_promises_of_a_target(tmp_path: Path) -> None:
    torch.save(training(), tmp_path / "x.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")

    with pytest.raises(DcpconvError, match="exists"):
        convert(tmp_path / "x.pth", tmp_path / "out", engine="torch")
    report = convert(tmp_path / "x.pth", tmp_path / "new", engine="torch")
    planned = convert(tmp_path / "x.pth", tmp_path / "dry", engine="torch", dry_run=True)

    assert (tmp_path / "out/mine").read_text() == "precious"
    streamed = convert(tmp_path / "x.pth", tmp_path / "ours")
    assert (report.source, report.target.nbytes) == (streamed.source, streamed.target.nbytes)
    assert planned.source == streamed.source
    assert not (tmp_path / "dry").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "out", "new", "ours"}


def test_torch_has_no_function_for_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "hf").mkdir()
    save_file({"a": random(2)}, tmp_path / "hf/model.safetensors")

    with pytest.raises(FileNotFoundError, match="torch's own functions read"):
        convert(tmp_path / "hf", tmp_path / "out", engine="torch")


def test_the_command_line_names_both_engines(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    torch.save(flat(), tmp_path / "x.pth")
    arguments = ["convert", str(tmp_path / "x.pth"), str(tmp_path / "out"), "--json"]

    done = CliRunner().invoke(app.app, [*arguments, "--engine", "torch"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["moved"] == {"by torch": 180}
    wrong = CliRunner().invoke(app.app, [*arguments, "--engine", "jax", "--overwrite"])
    assert wrong.exit_code == 2
    assert "there is no engine 'jax'" in wrong.stderr


def test_torchs_engine_casts_into_an_existing_file(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    torch.save(flat(), tmp_path / "x.pth")
    (tmp_path / "out").write_bytes(b"an older result")
    arguments = ["convert", str(tmp_path / "x.pth"), str(tmp_path / "out"), "--form", "torch"]
    arguments += ["--dtype", "bf16", "--engine", "torch", "--overwrite"]

    done = CliRunner().invoke(app.app, arguments)

    assert done.exit_code == 0, done.output
    found = torch.load(tmp_path / "out", weights_only=True)
    assert found.keys() == flat().keys()
    for key, value in flat().items():
        is_cast = value.is_floating_point() and value.dim() >= 2
        assert torch.equal(found[key], value.bfloat16() if is_cast else value), key
