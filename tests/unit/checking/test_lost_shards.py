"""A shard file that is lost, cut short or of another download is a problem in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from dcpconv import check, convert
from dcpconv.cli.app import app
from dcpconv.core.errors import FormatError
from support.checkpoints.check_cases import llama_shapes, write_hf


def write(directory: Path, form: str) -> list[Path]:
    """A Llama in three shard files with an index, and its config; its files."""
    write_hf(directory, llama_shapes())
    (directory / "model.safetensors").unlink()
    tensors = {key: torch.ones(shape) for key, shape in llama_shapes().items()}
    suffix, stem = ("safetensors", "model") if form == "hf" else ("bin", "pytorch_model")
    files = [directory / f"{stem}-{n:05}-of-00003.{suffix}" for n in (1, 2, 3)]
    weight_map = {key: files[n % 3].name for n, key in enumerate(tensors)}
    for file in files:
        held = {key: value for key, value in tensors.items() if weight_map[key] == file.name}
        save_file(held, file) if form == "hf" else torch.save(held, file)
    index = directory / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def lose(files: list[Path]) -> list[str]:
    files[1].unlink()
    return [files[1].name]


def lose_two(files: list[Path]) -> list[str]:
    files[0].unlink()
    files[2].unlink()
    return [files[0].name, files[2].name]


def cut(files: list[Path]) -> list[str]:
    files[1].write_bytes(files[1].read_bytes()[:-200])
    return [files[1].name]


def lose_and_cut(files: list[Path]) -> list[str]:
    return [*lose_two(files), *cut(files)]


def swap(files: list[Path]) -> list[str]:
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    return [files[0].name, files[1].name]


def zeros(files: list[Path]) -> list[str]:
    files[2].write_bytes(bytes(files[2].stat().st_size))
    return [files[2].name]


@pytest.mark.parametrize("form", ["hf", "torch"])
@pytest.mark.parametrize("harm", [lose, lose_two, cut, lose_and_cut, swap, zeros])
def test_the_report_names_every_file(
    form: str, harm: Callable[[list[Path]], list[str]], tmp_path: Path
) -> None:
    files = write(tmp_path / "in", form)
    assert check(tmp_path / "in")
    names = harm(files)

    found = CliRunner().invoke(app, ["check", str(tmp_path / "in")])
    assert found.exit_code == 1, found.output
    for name in names:
        assert name in found.output
    with pytest.raises(FormatError):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_key_that_no_index_names_is_told(tmp_path: Path) -> None:
    write(tmp_path / "in", "torch")
    index = tmp_path / "in/pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (lost, name), *rest = weight_map.items()
    index.write_text(json.dumps({"weight_map": dict(rest)}))
    report = check(tmp_path / "in")
    assert f"{name} holds {lost}, which the index does not name" in report.problems
