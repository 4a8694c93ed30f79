"""``--dtype``: which tensors change, what a cast may lose, and what the config says after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dcpconv import convert
from dcpconv.cli import app
from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError, LossyCastError
from support.checkpoints.stock import assert_same_bits, stock_load
from support.models.hf_models import save_hf, tiny

FORMS: tuple[Form, ...] = ("hf", "torch", "dcp")
LABELS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(70, 50, generator=generator),
        "transposed": torch.randn(6, 4, generator=generator).t(),
        "cube": torch.randn(2, 3, 4, generator=generator),
        "empty": torch.empty(0, 3),
        "half": torch.randn(3, 3, generator=generator).half(),
        "norm": torch.randn(50, generator=generator),
        "scalar": torch.tensor(1.5),
        "ids": torch.arange(12).reshape(3, 4),
        "mask": torch.tensor([[True, False]]),
    }


def save(directory: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, directory / "source.pth")
    return directory / "source.pth"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("cast_all", [False, True], ids=["matrices", "all"])
def test_a_cast_is_torchs_own(tmp_path: Path, form: Form, label: str, *, cast_all: bool) -> None:
    state, dtype = mixed(), LABELS[label]
    target = tmp_path / ("x.pth" if form == "torch" else "x")

    report = convert(save(tmp_path, state), target, form=form, dtype=label, cast_all=cast_all)

    expected = {
        key: tensor.to(dtype)
        if tensor.is_floating_point() and (cast_all or tensor.dim() >= 2)
        else tensor
        for key, tensor in state.items()
    }
    assert_same_bits(stock_load(target, form), expected)
    assert report.cast == sum(expected[key].dtype != state[key].dtype for key in state)


@pytest.mark.parametrize("chunks", [1, 3])
def test_what_becomes_infinite_is_an_error_that_names_every_tensor(
    tmp_path: Path, chunks: int
) -> None:
    state = {
        "fits": torch.full((5, 4), 65504.0),
        "a": torch.full((5, 4), 70000.0),
        "b": torch.tensor([[1.0, -1e6], [float("inf"), float("nan")]]),
        "norm": torch.tensor([70000.0]),
    }
    source = save(tmp_path, state)

    with pytest.raises(LossyCastError) as caught:
        convert(source, tmp_path / "out", form="dcp", dtype="fp16", chunks=chunks)

    text = str(caught.value)
    assert "--allow overflow" in (caught.value.hint or "")
    assert "a  20 values" in text or chunks > 1
    assert "b  1 values" in text
    assert not any(f"{key} " in text for key in ("fits", "norm"))
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]

    report = convert(
        source, tmp_path / "out", form="dcp", dtype="fp16", chunks=chunks, allow=["overflow"]
    )
    assert {loss.key: loss.overflowed for loss in report.lossy} == {"a": 20, "b": 1}
    assert_same_bits(
        stock_load(tmp_path / "out", "dcp"),
        {key: t.half() if t.dim() > 1 else t for key, t in state.items()},
    )


def test_what_becomes_zero_is_counted_per_tensor(tmp_path: Path) -> None:
    state = {
        "small": torch.tensor([[1e-9, 1.0], [-1e-9, 0.0]]),
        "fine": torch.tensor([[1e-4, 1.0]]),
    }

    report = convert(save(tmp_path, state), tmp_path / "out", form="dcp", dtype="fp16")

    assert [(loss.key, loss.overflowed, loss.underflowed) for loss in report.lossy] == [
        ("small", 0, 2)
    ]
    back = stock_load(tmp_path / "out", "dcp")
    assert back["small"].tolist() == [[0.0, 1.0], [-0.0, 0.0]]


def test_the_command_line_says_what_was_lost(tmp_path: Path) -> None:
    source = save(tmp_path, {"a": torch.tensor([[1e6, 1e-9]])})
    arguments = ["convert", str(source), str(tmp_path / "out"), "--dtype", "fp16"]

    refused = CliRunner().invoke(app.app, arguments)
    done = CliRunner().invoke(app.app, [*arguments, "--allow", "overflow"])

    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "LossyCastError" in refused.stderr
    assert "overflow  a  1 values" in refused.stderr
    assert done.exit_code == 0
    assert "lossy     a  1 overflowed, 1 became zero" in done.stdout


def test_a_type_that_is_none_is_refused_with_the_choice(tmp_path: Path) -> None:
    source = save(tmp_path, mixed())

    for name in ("int8", "float99", ""):
        with pytest.raises(DcpconvError, match="cannot cast to") as caught:
            convert(source, tmp_path / "out", dtype=name)
        assert "bf16" in str(caught.value)


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16"])
def test_a_type_has_its_usual_names(tmp_path: Path, name: str) -> None:
    report = convert(save(tmp_path, mixed()), tmp_path / "out", dtype=name)

    assert report.target.dtypes[0] == "bf16"


@pytest.mark.parametrize("style", ["4", "5"])
def test_the_config_that_is_carried_over_names_the_new_type(tmp_path: Path, style: Any) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf", config_style=style)

    convert(source, tmp_path / "out", form="hf", dtype="bf16")

    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert (after["dtype"], after.get("torch_dtype", "bfloat16")) == ("bfloat16", "bfloat16")
    same = before.keys() - {"dtype", "torch_dtype"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


@pytest.mark.parametrize("to", ["lingua", "meta"])
def test_a_generated_file_names_the_type_of_most_bytes(tmp_path: Path, to: str) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")

    convert(source, tmp_path / "out", to=to, dtype="bf16")
    convert(tmp_path / "out", tmp_path / "back", assets=source)

    back = stock_load(tmp_path / "back", "hf")
    assert back["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert back["model.norm.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


def test_every_tensor_is_counted_as_what_happened_to_it(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")

    report = convert(source, tmp_path / "out", to="lingua", dtype="bf16")

    assert report.copied == 7  # norms
    assert sum(item.tensors for item in report.relabelled) == 6  # wq and wk, cast as well
    assert report.cast == 23
