"""Sources as trainings leave them: converted, they are the model that was trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dcpconv import convert
from dcpconv.cli import app
from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.recognition import recognise
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp, stock_load
from support.worlds.wild_worlds import OBJECTS, kinds, plain

WEIGHTS = {**kinds(), **plain()}
TWO_RANKS = ["rows", "columns", "replicated"]
FOUR_RANKS = ["kinds", "kinds-on-rows"]


def hf_model(directory: Path) -> Any:
    """A model as ``from_pretrained`` makes it, no key missing and none too many."""
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    return model.eval()


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(tokens).logits)


# ------------------------------------------------------------------------------- odd tensors


@pytest.mark.parametrize("scene", TWO_RANKS)
def test_two_ranks_into_every_form(wild: Path, tmp_path: Path, scene: str) -> None:
    check_every_form(wild / scene, tmp_path)


@pytest.mark.parametrize("scene", FOUR_RANKS)
def test_four_ranks_into_every_form(four: Path, tmp_path: Path, scene: str) -> None:
    check_every_form(four / scene, tmp_path)


def check_every_form(source: Path, out: Path) -> None:
    """Weights and objects arrive where the form has a place for them, read by stock readers."""
    convert(source, out / "all.pth")
    loaded = torch.load(out / "all.pth", weights_only=True)
    assert_same_bits(flat(loaded["model"]), WEIGHTS)
    assert {key: loaded[key] for key in OBJECTS} == OBJECTS

    convert(source, out / "dcp", form="dcp", chunks=3)
    nested = nested_of_dcp(out / "dcp")
    assert_same_bits(flat(nested["model"]), WEIGHTS)  # type: ignore[arg-type]
    assert {key: nested[key] for key in OBJECTS} == OBJECTS

    report = convert(source, out / "hf", form="hf")
    assert_same_bits(stock_load(out / "hf", "hf"), WEIGHTS)
    assert set(report.left) >= set(OBJECTS)


def test_a_flat_dict_with_dots_stays_flat(wild: Path, tmp_path: Path) -> None:
    convert(wild / "flat", tmp_path / "x.pth")

    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert_same_bits(loaded, {f"model.{key}": tensor for key, tensor in kinds().items()})


# ------------------------------------------------------------------- accelerate, transformers


def test_accelerate_hides_the_weights_one_level_down(wild: Path, tmp_path: Path) -> None:
    with pytest.raises(DcpconvError) as caught:
        convert(wild / "accelerate/checkpoint-3", tmp_path / "out")

    assert "pytorch_model_fsdp_0" in (caught.value.hint or "")


@pytest.mark.parametrize("way", ["straight", "through lingua"])
def test_accelerate_to_hf(wild: Path, tmp_path: Path, way: str) -> None:
    source, hf = wild / "accelerate/checkpoint-3/pytorch_model_fsdp_0", wild / "accelerate/hf"
    weights = recognise(open_checkpoint(source))
    assert weights.root == "model."  # and not "model.model.", nor none
    assert weights.keymap is not None
    assert weights.keymap.family == "hf"

    if way == "through lingua":
        convert(source, tmp_path / "lingua", to="lingua", assets=hf)
        source = tmp_path / "lingua"
    convert(source, tmp_path / "out", assets=hf)

    model = hf_model(tmp_path / "out")
    assert_same_bits(model.state_dict(), hf_model(hf).state_dict())


def test_the_same_keys_without_a_wrapper_have_no_root(wild: Path, tmp_path: Path) -> None:
    bare = hf_model(wild / "accelerate/hf").state_dict()
    torch.save(bare, tmp_path / "bare.pth")
    torch.save({"model": bare}, tmp_path / "wrapped.pth")

    roots = {
        name: recognise(open_checkpoint(tmp_path / f"{name}.pth")).root
        for name in ("bare", "wrapped")
    }

    assert roots == {"bare": "", "wrapped": "model."}


@pytest.mark.parametrize("form", ["hf", "torch", "dcp"])
def test_slices_under_full_names_are_put_together(wild: Path, tmp_path: Path, form: Form) -> None:
    target = tmp_path / ("x.pth" if form == "torch" else "x")

    convert(wild / "transformers/saved", target, form=form)

    expected = hf_model(wild / "transformers/hf").state_dict()
    assert_same_bits(stock_load(target, form), expected)


@pytest.mark.parametrize("form", ["hf", "torch", "dcp"])
def test_scalars_integers_and_flags_in_slices_keep_their_values(
    wild: Path, tmp_path: Path, form: Form
) -> None:
    """torch's own consolidation writes scalars as zeros and fails on integers and flags."""
    target = tmp_path / ("x.pth" if form == "torch" else "x")

    convert(wild / "transformers/numbers", target, form=form)

    assert_same_bits(stock_load(target, form), WEIGHTS)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        pytest.param(1, "shard-00001-*.safetensors is absent", id="first"),
        # only config.json knows how long the tensors should be
        pytest.param(2, "model.embed_tokens.weight", id="last"),
    ],
)
def test_a_lost_file_of_slices_is_an_error(
    wild: Path, tmp_path: Path, lost: int, named: str
) -> None:
    saved = shutil.copytree(wild / "transformers/saved", tmp_path / "saved")
    (saved / f"shard-0000{lost}-model-00001-of-00001.safetensors").unlink()

    with pytest.raises(DcpconvError) as caught:
        convert(saved, tmp_path / "out", form="hf")

    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------- damage, by the verb


def _lose(path: Path) -> None:
    (path / "__1_0.distcp").unlink()


def _shorten(path: Path) -> None:
    os.truncate(path / "__1_0.distcp", 700)


def _metadata(path: Path) -> Any:
    import pickle

    return pickle.loads((path / ".metadata").read_bytes())


def _rewrite(path: Path, metadata: Any) -> None:
    import pickle

    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _gap(path: Path) -> None:
    metadata = _metadata(path)
    metadata.state_dict_metadata["model.int64.rows"].chunks.pop()
    _rewrite(path, metadata)


def _overlap(path: Path) -> None:
    metadata = _metadata(path)
    chunks = metadata.state_dict_metadata["model.int64.rows"].chunks
    old = chunks[1].offsets
    chunks[1].offsets = torch.Size((3, 0))
    for index in list(metadata.storage_data):
        if index.fqn == "model.int64.rows" and index.offset == old:
            item = metadata.storage_data.pop(index)
            metadata.storage_data[type(index)(index.fqn, torch.Size((3, 0)))] = item
    _rewrite(path, metadata)


@pytest.mark.parametrize("form", ["hf", "torch", "dcp"])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(_lose, "__1_0.distcp: file is missing", id="lost rank file"),
        pytest.param(_shorten, "__1_0.distcp: 700 bytes, but needs", id="item past the end"),
        pytest.param(_gap, "model.int64.rows", id="gap"),
        pytest.param(_overlap, "model.int64.rows", id="overlap"),
    ],
)
def test_damage_is_one_error_and_no_zeros(
    wild: Path, tmp_path: Path, damage: Any, named: str, form: Form
) -> None:
    from typer.testing import CliRunner

    source = shutil.copytree(wild / "rows", tmp_path / "source")
    damage(source)

    done = CliRunner().invoke(
        app.app, ["convert", str(source), str(tmp_path / "out"), "--form", form]
    )

    assert done.exit_code == 2
    assert done.stdout == ""
    assert named in done.stderr
    assert done.stderr.count("FormatError") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ------------------------------------------------------------------ torch files, single process


def test_sharded_pytorch_model_bin(wild: Path, tmp_path: Path) -> None:
    import json

    state = hf_model(wild / "accelerate/hf").state_dict()
    keys = list(state)
    source = tmp_path / "bins"
    source.mkdir()
    files = {key: f"pytorch_model-0000{1 + i % 3}-of-00003.bin" for i, key in enumerate(keys)}
    for name in set(files.values()):
        torch.save({key: state[key] for key in keys if files[key] == name}, source / name)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copy(wild / "accelerate/hf/config.json", source)

    convert(source, tmp_path / "hf", form="hf")
    assert_same_bits(hf_model(tmp_path / "hf").state_dict(), state)

    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FormatError, match="is named by the index but absent"):
        convert(source, tmp_path / "none", form="hf")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_prefixes_of_wrappers_go_away(
    wild: Path, tmp_path: Path, prefix: str, wrapper: str | None
) -> None:
    state = hf_model(wild / "accelerate/hf").state_dict()
    prefixed = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({wrapper: prefixed, "epoch": 3} if wrapper else prefixed, tmp_path / "x.pth")

    convert(tmp_path / "x.pth", tmp_path / "hf", form="hf", assets=wild / "accelerate/hf")

    assert_same_bits(hf_model(tmp_path / "hf").state_dict(), state)
