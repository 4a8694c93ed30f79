"""``diff`` against torch: the same numbers as on whole tensors, across forms, namings and types."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from dcpconv import Diff, convert, diff
from dcpconv.cli.app import app
from dcpconv.comparing.text import lines
from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError, SourceChangedError
from support.checkpoints.families import hf_tensors
from support.checkpoints.scaled_blocks import published
from support.models.hf_models import save_hf, tiny

NAMINGS: list[tuple[str, Form, str]] = [
    ("llama", "dcp", "lingua"),
    ("llama", "hf", "meta"),
    ("phi3", "hf", "hf-llama"),
    ("qwen3_moe", "dcp", "hf-memory"),
    ("glm", "dcp", "chatglm3"),
]


def changed(source: Path, key: str, change: dict[tuple[int, ...], float]) -> None:
    """Adds to elements of a stored tensor."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    for place, value in change.items():
        tensors[key][place] += value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(("model_type", "form", "to"), NAMINGS)
def test_a_conversion_is_the_same_and_what_changes_in_it_is_found(
    tmp_path: Path, model_type: str, form: Form, to: str
) -> None:
    source = save_hf(tiny(model_type), tmp_path / "hf")
    convert(source, tmp_path / "out", form=form, to=to, chunks=3 if form == "dcp" else 1)
    found = diff(source, tmp_path / "out")
    assert found
    assert {tensor.status for tensor in found.tensors} == {"equal"}

    key = "model.layers.1.self_attn.o_proj.weight"
    changed(source, key, {(3, 5): 0.5})
    found = diff(source, tmp_path / "out")

    assert not found
    assert [tensor.name for tensor in found.tensors if tensor.status != "equal"] == ["layer.1.o"]
    (tensor,) = found.of("differs")
    assert tensor.a is not None
    assert tensor.a.keys == (key,)
    assert tensor.apart is not None
    assert tensor.apart.at == (3, 5)
    assert tensor.apart.differing == 1
    assert tensor.apart.max_abs == pytest.approx(0.5)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_numbers_are_those_of_whole_tensors(
    tmp_path: Path, dtype: torch.dtype, other: torch.dtype
) -> None:
    torch.manual_seed(5)
    one = torch.randn(700, 911)
    two = one + 0.05 * torch.randn_like(one)
    a, b = one.to(dtype), two.to(other)
    save_file({"w": a}, tmp_path / "a.safetensors")
    save_file({"w": b}, tmp_path / "b.safetensors")

    (tensor,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").tensors

    assert tensor.status == "differs"
    apart = tensor.apart
    assert apart is not None
    x, y = a.double(), b.double()
    gap = (x - y).abs()
    assert apart.differing == int((x != y).sum())
    assert apart.max_abs == pytest.approx(float(gap.max()), rel=1e-6)
    assert float(gap[apart.at]) == pytest.approx(float(gap.max()), rel=1e-6)
    assert apart.mean_abs == pytest.approx(float(gap.mean()), rel=1e-6)
    assert apart.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-6)
    assert apart.norm_ratio == pytest.approx(float(y.norm() / x.norm()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)
    assert apart.cosine == pytest.approx(float(cosine), abs=1e-7)


ODD: list[tuple[str, Tensor, Tensor, str, int]] = [
    ("nan", torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), "equal", 0),
    ("nan-of-other-bits", torch.tensor([math.nan]), -torch.tensor([math.nan]), "close", 0),
    ("nan-once", torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]), "differs", 1),
    ("inf", torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.5]), "differs", 1),
    ("inf-once", torch.tensor([math.inf, 1.0]), torch.tensor([3.0, 1.0]), "differs", 1),
    ("zeros", torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), "close", 0),
    ("from-zero", torch.zeros(3), torch.ones(3), "differs", 3),
    ("empty", torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float16), "close", 0),
    ("scalar", torch.tensor(3), torch.tensor(4), "differs", 1),
    (
        "large-int",
        torch.tensor([2**24], dtype=torch.int32),
        torch.tensor([2**24 + 1]),
        "differs",
        1,
    ),
    ("huge-int", torch.tensor([2**62, 7]), torch.tensor([2**62 + 1, 7]), "differs", 1),
    ("far-int", torch.tensor([-(2**63), 5]), torch.tensor([2**63 - 1, 5]), "differs", 1),
    ("overflow", torch.tensor([3e38, 1.0]), torch.tensor([-3e38, 1.0]), "differs", 1),
    ("bool", torch.tensor([True, False]), torch.tensor([True, True]), "differs", 1),
    ("complex", torch.tensor([1 + 2j, 3.0]), torch.tensor([1 + 2j, 4 + 1j]), "differs", 1),
    ("int-and-float", torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), "close", 0),
]


@pytest.mark.parametrize(
    ("a", "b", "status", "differing"), [row[1:] for row in ODD], ids=[row[0] for row in ODD]
)
def test_odd_values(tmp_path: Path, a: Tensor, b: Tensor, status: str, differing: int) -> None:
    torch.save({"w": a}, tmp_path / "a.pth")
    torch.save({"w": b}, tmp_path / "b.pth")
    found = diff(tmp_path / "a.pth", tmp_path / "b.pth")
    (tensor,) = found.tensors
    assert tensor.status == status
    assert bool(found) is (status != "differs")
    if tensor.apart is not None:
        assert tensor.apart.differing == differing
    json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert list(lines(found))


def test_a_late_difference_and_the_threads_do_not_matter(tmp_path: Path) -> None:
    torch.manual_seed(1)
    a = torch.randn(3_000_000)
    b = a.clone()
    b[-2] += 1
    save_file({"w": a, "same": a.clone()}, tmp_path / "a.safetensors")
    save_file({"w": b, "same": a.clone()}, tmp_path / "b.safetensors")
    found = [
        diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", jobs=jobs)
        for jobs in (1, 2, 5)
    ]
    assert found[0] == found[1] == found[2]
    tensor = found[0].tensors[0]
    assert tensor.apart is not None
    assert tensor.apart.at == (2_999_998,)


def test_what_changed_most_comes_first_and_a_tolerance_forgives(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "a")
    other = save_hf(tiny("llama"), tmp_path / "b")
    changed(other, "model.layers.0.mlp.up_proj.weight", {(0, 0): 0.01})
    changed(other, "model.layers.2.self_attn.q_proj.weight", {(1, 0): 0.5, (9, 2): -0.25})

    found = diff(source, other)

    assert [tensor.name for tensor in found.of("differs")] == ["layer.2.q", "layer.0.up"]
    assert [tensor.name for tensor in diff(source, other, tolerance=0.02).of("close")] == [
        "layer.0.up"
    ]
    assert diff(source, other, tolerance=0.6)
    layers = {group.name: group.changed for group in found.groups("layer")}
    assert layers == {None: 0, 0: 1, 1: 0, 2: 1}
    slots = {group.name: group for group in found.groups("slot")}
    assert {name for name, group in slots.items() if group.changed} == {"layer.q", "layer.up"}
    assert slots["layer.q"].max_abs == pytest.approx(0.5)


def test_shapes_and_keys_of_one_side(tmp_path: Path) -> None:
    a = {"w": torch.zeros(3, 4), "x": torch.zeros(2), "z": torch.zeros(1)}
    b = {"w": torch.zeros(4, 3), "y": torch.zeros(2), "z": torch.zeros(1)}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert {tensor.name: tensor.status for tensor in found.tensors} == {
        "w": "shape",
        "x": "only_a",
        "y": "only_b",
        "z": "equal",
    }
    assert not found
    assert found.is_told


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("to", ["stored", "torchtitan-deepseek_v3"])
def test_weights_with_factors_are_compared_as_they_are_worth(
    tmp_path: Path, kind: torch.dtype, to: str
) -> None:
    packed, worth = published(tmp_path)
    plain = tmp_path / "plain"
    factors = {key for key in hf_tensors(packed) if key.endswith("_scale_inv")}
    tensors = {
        key: tensor.to(kind) if f"{key}_scale_inv" in factors else tensor
        for key, tensor in worth.items()
    }
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    convert(plain, tmp_path / "out", form="dcp", to=to, chunks=2)
    assets = packed if to != "stored" else None

    for a, b in ((packed, tmp_path / "out"), (tmp_path / "out", packed)):
        found = diff(a, b, assets=assets)
        assert found, [t.name for t in found.tensors if t.status not in {"equal", "close"}]
        assert len(found.of("close")) >= len(factors)
        assert any("as --dequantize would write it" in note for note in found.notes)

    key = "model.layers.1.self_attn.o_proj.weight"
    tensors[key][3, 5] += 4
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (tensor,) = diff(packed, plain).of("differs")
    assert tensor.apart is not None
    assert tensor.apart.at == (3, 5)
    assert tensor.apart.differing == 1
    assert tensor.apart.max_abs == pytest.approx(4, rel=0.01)


def test_packed_weights_that_cannot_be_multiplied_out_are_not_told(tmp_path: Path) -> None:
    weight = torch.randn(128, 128)
    packed = {
        "w.weight": weight.to(torch.float8_e4m3fn),
        "w.weight_scale_inv": torch.ones(3, 5),
    }
    save_file(packed, tmp_path / "a.safetensors")
    save_file(
        {"w.weight": weight.bfloat16(), "w.weight_scale_inv": torch.ones(3, 5)},
        tmp_path / "b.safetensors",
    )
    names = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    found = diff(*names)
    assert {tensor.status for tensor in found.tensors} == {"untold", "equal"}
    assert not found
    assert not found.is_told
    done = CliRunner().invoke(app, ["diff", *names])
    assert done.exit_code == 2
    assert "f8e4m3 with factors beside bf16" in done.stdout


def test_unknown_models_are_compared_by_their_keys(tmp_path: Path) -> None:
    tensors = {f"blocks.{n}.w": torch.randn(5, 3) for n in range(3)}
    torch.save({"model": tensors, "step": 3}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "dcp", form="dcp", only="model", chunks=2)
    found = diff(tmp_path / "a.pth", tmp_path / "dcp")
    assert found
    assert [tensor.layer for tensor in found.tensors] == [0, 1, 2]
    assert {tensor.slot for tensor in found.tensors} == {"blocks.N.w"}


def test_without_a_config_the_same_naming_is_compared_as_it_is_stored(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    for name in ("a.pth", "b.pth"):
        convert(source, tmp_path / name, form="torch", to="lingua")
    found = diff(tmp_path / "a.pth", tmp_path / "b.pth")
    assert found
    assert any("as stored" in note for note in found.notes)
    with pytest.raises(DcpconvError):
        diff(tmp_path / "a.pth", source)
    assert diff(tmp_path / "a.pth", source, assets=source)


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["diff", *words])
    return done.exit_code, done.stdout


def test_the_command_answers_by_its_exit_code(tmp_path: Path) -> None:
    a = str(save_hf(tiny("llama"), tmp_path / "a"))
    b = str(save_hf(tiny("llama"), tmp_path / "b"))
    code, text = run(a, b)
    assert (code, text.splitlines()[-1]) == (
        0,
        "yes       they are the same: 30 tensors, bit for bit",
    )

    changed(Path(b), "model.norm.weight", {(7,): 1.0})
    code, text = run(a, b)
    assert code == 1
    assert "final_norm 2" in text or "final_norm 1" in text
    assert text.splitlines()[-1] == "no        they differ: 1 of 30 tensors"
    code, text = run(a, b, "--json", "--by", "slot")
    assert code == 1
    told = json.loads(text)
    assert told["tensors"][0]["name"] == "final_norm"
    assert told["tensors"][0]["apart"]["at"] == [7]
    assert {group["name"]: group["changed"] for group in told["groups"]}["final_norm"] == 1
    assert run(a, str(tmp_path / "none"))[0] == 2
    assert run(a, b, "--by", "moon")[0] == 2


@pytest.mark.parametrize("is_equal", [True, False], ids=["equal", "changed"])
def test_no_torch_is_needed_and_no_numpy_for_what_is_equal(
    tmp_path: Path, *, is_equal: bool
) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="lingua", dtype=None if is_equal else "bf16")
    code = (
        f"import sys; from dcpconv import diff; assert bool(diff(*sys.argv[1:])) is {is_equal};"
        f" assert not {{'torch', *({is_equal} and ['numpy'] or [])}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "dcp"], check=True)


def test_every_difference_of_many_is_counted(tmp_path: Path) -> None:
    a = {f"t.{n}.w": torch.full((3,), float(n)) for n in range(60)}
    b = {key: value + (0 if key.endswith("7.w") else 1) for key, value in a.items()}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    found: Diff = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert len(found.of("differs")) == 54
    text = list(lines(found))
    assert "value     and 34 more; --json lists them all" in text
    assert text[-1] == "no        they differ: 54 of 60 tensors"


def test_the_sources_may_not_change_while_they_are_read(tmp_path: Path) -> None:
    a = save_hf(tiny("llama"), tmp_path / "a")
    b = save_hf(tiny("llama"), tmp_path / "b")
    seen: list[int] = []
    once = iter([True])  # threads call, and only the first of them may find it

    def rewrite(nbytes: int) -> None:
        if next(once, False):
            copy = tmp_path / "copy"
            copy.write_bytes((b / "model.safetensors").read_bytes())
            copy.replace(b / "model.safetensors")
        seen.append(nbytes)

    with pytest.raises(SourceChangedError):
        diff(a, b, progress=rewrite)
    assert seen
