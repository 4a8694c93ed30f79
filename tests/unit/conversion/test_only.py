"""``--only``: part of a checkpoint, without reading the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import convert
from dcpconv.core.catalog import Form
from dcpconv.core.errors import FormatError
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp

ROWS = 1000
"""Of 1 KiB each: the payloads dwarf every header."""


def training() -> dict[str, Any]:
    weights = {f"layers.{n}.weight": torch.full((ROWS, 256), float(n)) for n in range(2)}
    moments = {
        key: {"exp_avg": torch.ones_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
        for key, tensor in weights.items()
    }
    return {
        "model": weights,
        "optim": {"state": moments, "param_groups": [{"lr": 0.1, "params": list(weights)}]},
        "step": 7,
    }


def written(directory: Path, form: str) -> Path:
    if form == "torch":
        torch.save(training(), directory / "source.pth")
        return directory / "source.pth"
    save(training(), checkpoint_id=directory / "source")
    return directory / "source"


def nested(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True) if path.suffix == ".pth" else nested_of_dcp(path)


def bytes_read() -> int:
    """What this process has asked the kernel for so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.parametrize("source", ["torch", "dcp"])
@pytest.mark.parametrize("form", ["hf", "torch", "dcp"])
def test_the_optimizer_is_not_read(tmp_path: Path, source: str, form: Form) -> None:
    if not Path("/proc/self/io").exists():
        pytest.skip("this system does not count bytes")
    path = written(tmp_path, source)
    convert(path, tmp_path / "warm-up.pth", only="model")  # modules that are imported late
    nbytes = sum(tensor.nbytes for tensor in training()["model"].values())

    start = bytes_read()
    report = convert(
        path, tmp_path / ("x.pth" if form == "torch" else "x"), form=form, only="model"
    )

    assert bytes_read() - start < 1.2 * nbytes
    assert report.target.nbytes == nbytes


@pytest.mark.parametrize("source", ["torch", "dcp"])
@pytest.mark.parametrize("target", ["x.pth", "x"])
def test_the_container_stays(tmp_path: Path, source: str, target: str) -> None:
    form: Form = "torch" if target == "x.pth" else "dcp"

    convert(written(tmp_path, source), tmp_path / target, form=form, only="model")

    found = nested(tmp_path / target)
    assert set(found) == {"model"}
    assert_same_bits(found["model"], training()["model"])


def test_an_empty_root_takes_the_container_away(tmp_path: Path) -> None:
    convert(written(tmp_path, "dcp"), tmp_path / "x.pth", only="model", root="")

    assert_same_bits(nested(tmp_path / "x.pth"), training()["model"])


def test_another_root_takes_its_place(tmp_path: Path) -> None:
    convert(written(tmp_path, "dcp"), tmp_path / "x.pth", only="model", root="state.net")

    assert_same_bits(flat(nested(tmp_path / "x.pth")["state"]["net"]), training()["model"])


def test_the_optimizer_alone(tmp_path: Path) -> None:
    convert(written(tmp_path, "torch"), tmp_path / "x.pth", only="optim")

    found, expected = nested(tmp_path / "x.pth"), training()
    assert set(found) == {"optim"}
    assert found["optim"]["param_groups"] == expected["optim"]["param_groups"]
    assert_same_bits(flat(found), flat({"optim": expected["optim"]}))


def test_a_pattern_takes_what_it_matches(tmp_path: Path) -> None:
    convert(written(tmp_path, "dcp"), tmp_path / "x.pth", only="model.layers.1.*")

    assert list(flat(nested(tmp_path / "x.pth"))) == ["model.layers.1.weight"]


def test_nothing_under_a_key_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="under 'modle'") as caught:
        convert(written(tmp_path, "torch"), tmp_path / "x.pth", only="modle")

    assert "model, optim, step" in str(caught.value)
    assert not (tmp_path / "x.pth").exists()
