"""Our engine against torch's own converters: equal tensors, keys, nesting and objects."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import _extension, format_utils
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import convert, dcp_to_torch_save, torch_save_to_dcp
from dcpconv.cli import app
from dcpconv.conversion.convert import Engine
from dcpconv.core.errors import DcpconvError, FormatError
from support.checkpoints.stock import nested_of_dcp

State = dict[str, Any]
ENGINES: tuple[Engine, ...] = ("stream", "torch")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat() -> State:
    return {"layers.0.weight": _random(7, 5), "layers.0.bias": _random(7), "norm": _random(3)}


def training() -> State:
    moments = {
        number: {"step": torch.tensor(3.0), "exp_avg": _random(5, 3, seed=number)}
        for number in range(2)
    }
    groups = [
        {"lr": 1e-3, "betas": (0.9, 0.95), "params": [0]},
        {"lr": 1e-4, "betas": (0.9, 0.95), "params": [1], "foreach": None},
    ]
    return {
        "model": {"a.weight": _random(5, 3), "b": {"weight": _random(2, 2, 2)}},
        "optim": {"state": moments, "param_groups": groups},
        "step": 7,
        "name": "run",
        "lr": 0.5,
        "history": [1, "two", 3.0, None, True],
        "nothing": {},
    }


def every_dtype() -> State:
    numbers = torch.arange(12).reshape(3, 4)
    names = (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "uint16", "uint32"),
    )
    return {name: numbers.to(getattr(torch, name)) for name in names}


def odd_shapes() -> State:
    return {
        "scalar": torch.tensor(3.5),
        "flag": torch.tensor(True),
        "count": torch.tensor(-9),
        "empty": torch.empty(0),
        "no rows": torch.empty(0, 3),
        "no columns": torch.empty(3, 0, dtype=torch.int64),
        "one": torch.ones(1, 1, 1),
    }


def strided() -> State:
    base = _random(6, 4)
    return {
        "transposed": base.t(),
        "every other": base[::2],
        "column": base[:, 1],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "part": base[2:5],
    }


def tied() -> State:
    weight = _random(5, 4)
    return {"embed.weight": weight, "head.weight": weight, "view": weight[1:3]}


def lists_of_tensors() -> State:
    return {"parts": [_random(2), {"a": _random(3)}, [_random(1), 5]], "tuple": (1, 2)}


CASES = [
    pytest.param(case, id=case.__name__)
    for case in (flat, training, every_dtype, odd_shapes, strided, tied, lists_of_tensors)
]


def assert_same(found: object, expected: object, at: str = "") -> None:
    """Equal containers, in order, with equal leaves; tensors bit for bit."""
    assert type(found) is type(expected), at
    if isinstance(expected, dict) and isinstance(found, dict):
        assert list(found) == list(expected), at
        for key, item in expected.items():
            assert_same(found[key], item, f"{at}.{key}")
    elif isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        assert len(found) == len(expected), at
        for number, item in enumerate(expected):
            assert_same(found[number], item, f"{at}.{number}")
    elif isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), at
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (found, expected)]
        assert torch.equal(*bits), at
    else:
        assert found == expected, at


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def metadata(path: Path) -> tuple[object, ...]:
    """What ``.metadata`` says about every key, without where the bytes lie."""
    read = FileSystemReader(path).read_metadata()
    return (
        {key: (type(value), getattr(value, "size", None)) for key, value in listed(read).items()},
        read.planner_data,
    )


def listed(read: Metadata) -> dict[str, object]:
    return dict(sorted(read.state_dict_metadata.items()))


@pytest.mark.parametrize("case", CASES)
def test_a_torch_file_becomes_the_same_dcp(tmp_path: Path, case: Callable[[], State]) -> None:
    torch.save(case(), tmp_path / "x.pth")

    format_utils.torch_save_to_dcp(tmp_path / "x.pth", tmp_path / "torch")
    torch_save_to_dcp(tmp_path / "x.pth", tmp_path / "drop-in")
    for engine in ENGINES:
        convert(tmp_path / "x.pth", tmp_path / f"by-{engine}", engine=engine, form="dcp")

    expected = nested_of_dcp(tmp_path / "torch")
    for name in ("drop-in", "by-stream", "by-torch"):
        assert_same(nested_of_dcp(tmp_path / name), expected)
        assert metadata(tmp_path / name) == metadata(tmp_path / "torch")


@pytest.mark.parametrize("case", CASES)
def test_a_dcp_becomes_the_same_torch_file(tmp_path: Path, case: Callable[[], State]) -> None:
    save(case(), checkpoint_id=tmp_path / "dcp")

    format_utils.dcp_to_torch_save(tmp_path / "dcp", tmp_path / "torch.pth")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "drop-in.pth")
    for engine in ENGINES:
        convert(tmp_path / "dcp", tmp_path / f"by-{engine}.pth", engine=engine)

    expected = loaded(tmp_path / "torch.pth")
    for name in ("drop-in", "by-stream", "by-torch"):
        assert_same(loaded(tmp_path / f"{name}.pth"), expected)


def test_a_flat_dcp_stays_flat(tmp_path: Path) -> None:
    state = {"model.a.weight": _random(3, 2), "model.b": _random(2)}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    save(state, checkpoint_id=tmp_path / "dcp", planner=planner)

    for engine in ENGINES:
        convert(tmp_path / "dcp", tmp_path / f"{engine}.pth", engine=engine)
        assert_same(loaded(tmp_path / f"{engine}.pth"), state)


def test_tied_tensors_stay_one_where_torch_stores_two(tmp_path: Path) -> None:
    torch.save(tied(), tmp_path / "x.pth")

    torch_save_to_dcp(tmp_path / "x.pth", tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "y.pth")

    items = FileSystemReader(tmp_path / "dcp").read_metadata().storage_data
    offsets = {index.fqn: item.offset for index, item in items.items()}
    assert offsets["embed.weight"] == offsets["head.weight"]
    back = loaded(tmp_path / "y.pth")
    assert back["embed.weight"].data_ptr() == back["head.weight"].data_ptr()


@pytest.mark.parametrize("suffix", ["to-dcp", "to-hf", "to-pth"])
def test_the_form_before_zip_archives_goes_through_torch(tmp_path: Path, suffix: str) -> None:
    state = {"model": {"a": _random(5, 3), "n": torch.arange(3)}, "step": 7}
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
    state = {"model": {"a": _random(5, 3)}, "step": 7}
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
    state = {"model": {"a": _random(2, 2)}, "extra": _Planted(mark)}
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
    save_file({"a": _random(2)}, tmp_path / "hf/model.safetensors")

    with pytest.raises(FileNotFoundError, match="torch's own functions read"):
        convert(tmp_path / "hf", tmp_path / "out", engine="torch")


# -------------------------------------------------------------------------------- the drop-ins


def test_drop_ins_replace_what_is_there_and_make_directories(tmp_path: Path) -> None:
    torch.save(flat(), tmp_path / "x.pth")
    step = tmp_path / "dump/checkpoints/0000000001"
    step.mkdir(parents=True)
    (step / "params.json").write_text("{}")
    (step / "old").mkdir()
    (step / "old/notes.txt").write_text("mine")
    (step / "link").symlink_to("params.json")
    save({"stale": _random(4)}, checkpoint_id=step)
    (step / "__1_0.distcp").write_bytes(b"of a rank that is gone")

    torch_save_to_dcp(tmp_path / "x.pth", str(step))
    dcp_to_torch_save(str(step), tmp_path / "deep/down/y.pth")
    dcp_to_torch_save(step, tmp_path / "deep/down/y.pth")

    assert_same(loaded(tmp_path / "deep/down/y.pth"), flat())
    names = {".metadata", "__0_0.distcp", "params.json", "old", "link"}
    assert {path.name for path in step.iterdir()} == names
    assert (step / "old/notes.txt").read_text() == "mine"
    assert (step / "link").is_symlink()


def test_a_drop_in_never_replaces_the_directory_it_reads_from(tmp_path: Path) -> None:
    (tmp_path / "step/consolidated").mkdir(parents=True)
    torch.save(flat(), tmp_path / "step/consolidated/consolidated.pth")

    with pytest.raises(DcpconvError, match="cannot be written"):
        torch_save_to_dcp(tmp_path / "step/consolidated/consolidated.pth", tmp_path / "step")

    assert (tmp_path / "step/consolidated/consolidated.pth").exists()


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
