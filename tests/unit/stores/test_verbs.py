"""What every verb says of a checkpoint in a store is what it says of the same one on a disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dcpconv import (
    CheckpointReader,
    check,
    convert,
    diff,
    fingerprint,
    load_init_weights,
)
from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.stores.store import StoreError
from support.machine.hub_server import Hub, point_to, serving
from support.machine.s3_server import serving_s3
from support.machine.static_server import static
from support.versions import load_alone


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def buckets(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose one bucket is the directory that the model is in."""
    pytest.importorskip("huggingface_hub", minversion="1.0")
    with serving(model.parent) as hub:
        point_to(hub, monkeypatch)
        yield hub


@pytest.fixture(params=["s3", "http", "hf", "hf-bucket"])
def url(
    request: pytest.FixtureRequest, model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Of the model, in a store."""
    if request.param == "s3":
        with serving_s3(monkeypatch) as bucket:
            yield bucket.upload(model, "model")
    elif request.param == "http":
        with static(model.parent) as server:
            yield f"{server}/model"
    elif request.param == "hf":
        with serving(model) as hub:
            point_to(hub, monkeypatch)
            yield "hf://org/tiny"
    else:
        request.getfixturevalue("buckets")
        yield "hf://buckets/org/tiny/model"


@pytest.mark.parametrize(
    "words",
    [["check"], ["keys"], ["params"], ["inspect"], ["fingerprint"], ["fingerprint", "--json"]],
    ids=" ".join,
)
def test_a_command_says_the_same_as_of_files_here(words: list[str], url: str, model: Path) -> None:
    there, here = (CliRunner().invoke(app, [*words, str(name)]) for name in (url, model))
    assert there.exit_code == 0, there.output
    assert there.stdout.split() == here.stdout.replace(str(model), url).split()


def test_differences_are_found_from_afar(
    url: str, model: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    convert(model, tmp_path / "dcp", to="lingua")
    same = CliRunner().invoke(app, ["diff", url, str(tmp_path / "dcp")])
    assert same.exit_code == 0, same.output
    changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}
    torch.save(changed, tmp_path / "changed.pth")
    other = str(tmp_path / "changed.pth")
    for afar, here in (((url, other), (str(model), other)), ((other, url), (other, str(model)))):
        said = [
            CliRunner().invoke(app, ["diff", *names, "--json", "--stored"])
            for names in (afar, here)
        ]
        assert [one.exit_code for one in said] == [1, 1], said[0].output
        found, expected = (json.loads(one.stdout)["tensors"] for one in said)
        assert found == expected


def test_two_stores_are_compared(url: str, model: Path) -> None:
    assert diff(url, url)
    assert fingerprint(url).digest == fingerprint(model).digest


def test_a_model_and_a_reader_are_filled_from_afar(
    url: str, model: Path, tensors: dict[str, torch.Tensor]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    live = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).bfloat16()
    load_init_weights(live, url)
    state = live.state_dict()
    assert all(torch.equal(state[key], value) for key, value in tensors.items())
    found = {key: torch.zeros_like(value) for key, value in tensors.items()}
    load_alone(found, storage_reader=CheckpointReader(url))
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


def test_a_conversion_from_afar_is_that_of_files_here(
    url: str, model: Path, tmp_path: Path
) -> None:
    convert(url, tmp_path / "afar.pth", to="lingua")
    convert(model, tmp_path / "here.pth", to="lingua")
    assert (tmp_path / "afar.pth").read_bytes() == (tmp_path / "here.pth").read_bytes()
    assert check(url, against=tmp_path / "here.pth")


def test_runs_in_a_bucket_of_the_hub_are_found(buckets: Hub, model: Path) -> None:
    run = model.parent / "run"
    for step in (500, 1000):
        made = run / f"checkpoint-{step}"
        made.mkdir(parents=True)
        for file in model.iterdir():
            os.link(file, made / file.name)
        (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    there = "hf://buckets/org/tiny/run"
    found = CliRunner().invoke(app, ["runs", "latest", there])
    assert (found.exit_code, found.stdout) == (0, f"{there}/checkpoint-1000\n")
    found = CliRunner().invoke(app, ["runs", "resolve", there, "500"])
    assert found.stdout == f"{there}/checkpoint-500\n"
    assert CliRunner().invoke(app, ["runs", "list", there]).exit_code == 0
    assert buckets.asked


def test_a_file_in_a_bucket_of_the_hub_is_read(buckets: Hub, model: Path) -> None:
    file = "model/model.safetensors"
    found = open_checkpoint(f"hf://buckets/org/tiny/{file}")
    assert found.tensors == open_checkpoint(model.parent / file).tensors
    assert buckets.served["model/model.safetensors"] <= 64 << 10


def test_a_bucket_of_the_hub_takes_no_result_and_one_that_is_not_there_is_told(
    buckets: Hub, model: Path
) -> None:
    with pytest.raises(StoreError, match="results are not written to this store"):
        convert(model, "hf://buckets/org/tiny/out", to="lingua")
    with pytest.raises(DcpconvError, match="there is no such bucket"):
        check("hf://buckets/org/none/model")
    assert not (buckets.directory / "out").exists()
