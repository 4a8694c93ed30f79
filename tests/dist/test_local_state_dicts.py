"""FSDP1's local and sharded state dicts of two and three ranks equal the model before wrapping."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import CheckpointReader, check, convert, load_init_weights
from dcpconv.core.errors import FormatError
from dcpconv.runs.verifying import verify_checkpoints
from support.checkpoints.stock import assert_same_bits, stock_load
from support.models.hf_models import tiny
from support.worlds import local_state_worlds
from support.worlds.dcp_worlds import launch
from support.worlds.local_state_worlds import SCENES, plain

FLAT = [name for name in SCENES if name.endswith("local-flat")]
OF_KNOWN = [name for name in SCENES if not name.startswith("plain")]


@pytest.fixture(scope="module", params=[2, 3], ids=lambda ranks: f"{ranks}-ranks")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("local-states")
    launch(request.param, directory, script=local_state_worlds.__file__)
    return directory


def full(directory: Path) -> dict[str, Any]:
    """What was wrapped, without second names that files of the model leave out."""
    loaded: dict[str, Any] = torch.load(directory / "full.pt", weights_only=True)
    if directory.name.startswith("gemma2"):
        del loaded["lm_head.weight"]
    return loaded


@pytest.mark.parametrize("scene", SCENES)
def test_weights_are_those_of_the_model_that_was_wrapped(
    saved: Path, tmp_path: Path, scene: str
) -> None:
    directory = saved / scene
    assets = directory / "full.pt" if scene in {"plain-local-named", "plain-local-flat"} else None
    convert(directory, tmp_path / "out.pth", form="torch", assets=assets)
    found = stock_load(tmp_path / "out.pth", "torch")
    found.pop("lm_head.weight", None) if scene.startswith("gemma2") else None
    assert_same_bits(found, full(directory))


@pytest.mark.parametrize("scene", OF_KNOWN)
def test_shapes_come_from_the_config_beside_the_files(
    saved: Path, tmp_path: Path, scene: str
) -> None:
    assert check(saved / scene, to="lingua" if scene.startswith("llama") else None)
    convert(saved / scene, tmp_path / "hf", form="hf")
    convert(saved / scene / "full.pt", tmp_path / "expected", form="hf", assets=saved / scene)
    assert_same_bits(stock_load(tmp_path / "hf", "hf"), stock_load(tmp_path / "expected", "hf"))


@pytest.mark.parametrize("scene", FLAT)
def test_a_live_model_says_the_shapes(saved: Path, tmp_path: Path, scene: str) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for file in (saved / scene).glob("*.bin"):
        shutil.copy(file, files)
    model = plain() if scene.startswith("plain") else tiny(scene.partition("-")[0])
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    load_init_weights(model, files)
    whole = torch.load(saved / scene / "full.pt", weights_only=True)
    assert_same_bits(model.state_dict(), whole if scene.startswith("plain") else expected)


@pytest.mark.parametrize("scene", OF_KNOWN)
def test_stock_load_reads_local_state_dicts(saved: Path, scene: str) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    expected = full(saved / scene)
    state = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    load(state, storage_reader=CheckpointReader(saved / scene))
    assert_same_bits(state, expected)


def test_nothing_says_the_shapes(saved: Path, tmp_path: Path) -> None:
    for scene in ("plain-local-named", "plain-local-flat"):
        with pytest.raises(FormatError, match="without their shapes") as caught:
            convert(saved / scene, tmp_path / "out", form="dcp")
        assert "--assets DIR" in str(caught.value.hint)


@pytest.mark.parametrize("naming", ["named", "flat"])
def test_shapes_of_another_model_are_refused(saved: Path, tmp_path: Path, naming: str) -> None:
    other = saved / "gemma2-local-named"
    with pytest.raises(FormatError, match="are not those that it was given") as caught:
        convert(saved / f"llama-local-{naming}", tmp_path / "out", form="dcp", assets=other)
    assert ("shapes of", str(other)) in caught.value.facts


def test_vectors_need_the_order_of_their_parameters(saved: Path, tmp_path: Path) -> None:
    whole = torch.load(saved / "plain-local-flat" / "full.pt", weights_only=True)
    del whole["4.inner.weight"]  # safetensors keeps one of two names
    from safetensors.torch import save_file

    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(FormatError) as caught:
        convert(saved / "plain-local-flat", tmp_path / "out", form="dcp", assets=tmp_path)
    assert "FILE.pth" in str(caught.value.hint)
    convert(saved / "plain-local-named", tmp_path / "out.pth", form="torch", assets=tmp_path)
    assert_same_bits(stock_load(tmp_path / "out.pth", "torch"), full(saved / "plain-local-named"))


def test_a_lost_rank_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "llama-local-flat", tmp_path / "in")
    (tmp_path / "in" / "pytorch_model_fsdp_rank1.bin").unlink()
    with pytest.raises(FormatError, match="files of ranks are missing"):
        convert(tmp_path / "in", tmp_path / "out", form="dcp")


def test_one_rank_alone_is_refused(saved: Path, tmp_path: Path) -> None:
    file = saved / "llama-local-named" / "pytorch_model_fsdp_rank0.bin"
    for engine in ("stream", "torch"):
        with pytest.raises(FormatError):
            convert(file, tmp_path / "out", form="dcp", engine=engine, trust=engine == "torch")


def test_a_run_of_local_state_dicts_is_verified(saved: Path, tmp_path: Path) -> None:
    step = tmp_path / "checkpoint-3"
    shutil.copytree(saved / "llama-local-named", step)
    (step / "full.pt").unlink()
    (step / "trainer_state.json").write_text('{"global_step": 3}')
    for rank in range(len([*step.glob("*.bin")])):
        torch.save({}, step / f"rng_state_{rank}.pth")
    (checked,) = verify_checkpoints(tmp_path)
    assert checked.problems == ()
    assert (checked.step.form, checked.step.weights) == ("ranks", step)
    last = max(step.glob("*.bin"))
    last.unlink()
    (checked,) = verify_checkpoints(tmp_path)
    assert f"{last.name} is missing" in checked.problems
