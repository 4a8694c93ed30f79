"""Ranks save into a bucket: the bytes that they save on a disk, or what was there before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dcpconv import check, open_checkpoint, save_weights
from support.machine.hub_server import serving
from support.machine.s3_server import BUCKET, Bucket, serving_s3
from support.worlds import load_scenes, lost_savers, saving_afar
from support.worlds.conversions import tree
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.ranks import run_ranks
from support.worlds.saving_afar import FORMS

World = list[dict[str, Outcome]]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch, serving_s3(patch) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("saving-afar")
    load_scenes.prepare(made, ())
    (made / "hub").mkdir()
    return made


@pytest.fixture(scope="module")
def world(bucket: Bucket, directory: Path) -> Iterator[World]:
    del bucket
    with serving(directory / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(directory / "hub-home"))
        patch.setenv("HF_TOKEN", "hf_of_the_tests")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        yield launch(saving_afar.__file__, 2, directory)


def values(world: World, scene: str) -> list[Any]:
    found = [rank[scene] for rank in world]
    for outcome in found:
        assert not outcome.error, outcome.text
    return [outcome.value for outcome in found]


def failure(world: World, scene: str) -> Outcome:
    """How a scene failed: alike on all ranks."""
    found = [rank[scene] for rank in world]
    assert len({(outcome.error, outcome.text) for outcome in found}) == 1, found
    assert found[0].error
    return found[0]


def without_the_directory(files: dict[str, bytes]) -> dict[str, bytes]:
    """Lingua's parameter file names it."""
    return {name: data for name, data in files.items() if name != "params.json"}


@pytest.mark.parametrize("form", FORMS)
def test_objects_have_the_bytes_of_files(
    form: str, world: World, bucket: Bucket, directory: Path
) -> None:
    values(world, "forms")
    here = tree(directory / "afar-2" / form)
    assert without_the_directory(bucket.contents(f"forms/{form}")) == without_the_directory(here)
    assert not [key for key in bucket.unfinished() if key.startswith("forms/")]


def test_every_object_is_sent_by_one_rank_and_all_ranks_send(world: World) -> None:
    for form in FORMS:
        one, other = (set(heard[form]["sent"]) for heard in values(world, "forms"))
        assert not one & other
        assert one
        is_one_object = form in {"hf", "meta.pth"}
        assert bool(other) != is_one_object
        for heard in values(world, "forms"):
            assert any("rank 0" in note for note in heard[form]["notes"]) == is_one_object
            assert heard[form]["path"] == f"s3://{BUCKET}/forms/{form}"


def test_long_objects_go_out_in_parts_of_which_few_wait(
    world: World, bucket: Bucket, directory: Path
) -> None:
    most = values(world, "parts")
    assert bucket.contents("parts") == tree(directory / "afar-2/parts")
    assert all(nbytes <= 15 << 20 for nbytes in most)
    etags = [
        item["ETag"].strip('"')
        for item in bucket.client.list_objects_v2(Bucket=BUCKET, Prefix="parts/")["Contents"]
        if item["Key"].endswith(".safetensors")
    ]
    # Of an object of several parts it ends with their number.
    assert any(int(etag.partition("-")[2] or 1) > 2 for etag in etags)


def test_an_older_result_is_replaced_when_asked(
    world: World, bucket: Bucket, directory: Path
) -> None:
    assert failure(world, "overwrites").error == "TargetExistsError"
    here, there = directory / "afar-2/overwritten", f"s3://{BUCKET}/overwritten"
    assert check(there, against=here)
    found = bucket.contents("overwritten")
    names = json.loads(found["model.safetensors.index.json"])["weight_map"]
    assert {*names.values()} == {name for name in found if name.endswith(".safetensors")}
    (directory / "fetched").mkdir()
    for name, data in found.items():
        (directory / "fetched" / name).write_bytes(data)
    for key, name in names.items():
        old = json.loads((here / "model.safetensors.index.json").read_text())["weight_map"][key]
        one, other = load_file(directory / "fetched" / name), load_file(here / old)
        assert torch.equal(one[key], other[key])


SPOILT = {
    "fails": "Input/output error",
    "denied": "access was denied",
    "elsewhere": "another rank's objects are not where they should be",
    "not-installed": "obstore, which is not installed",
}


@pytest.mark.parametrize("scene", SPOILT)
def test_a_rank_that_fails_leaves_the_old_result_and_nothing_else(
    scene: str, world: World, bucket: Bucket
) -> None:
    assert SPOILT[scene] in failure(world, scene).text
    values(world, "forms")
    assert bucket.contents(scene) == bucket.contents("forms/hf-small-files")
    assert not [key for key in bucket.unfinished() if key.startswith(scene)]


@pytest.mark.parametrize(
    ("scene", "error", "prefix"),
    [("overflows", "LossyCastError", "overflow"), ("unequal-ties", "FormatError", "ties")],
)
def test_what_is_refused_late_leaves_nothing(
    scene: str, error: str, prefix: str, world: World, bucket: Bucket
) -> None:
    assert failure(world, scene).error == error
    assert bucket.contents(prefix) == {}


def test_one_writer_saves_step_after_step(world: World, bucket: Bucket) -> None:
    assert values(world, "async") == [f"s3://{BUCKET}/steps/2"] * 2
    for step in ("steps/1", "steps/2"):
        assert bucket.contents(step) == bucket.contents("forms/hf-small-files")


def test_a_repository_gets_one_commit_of_rank_0(world: World, directory: Path) -> None:
    for notes in values(world, "hub"):
        assert any("rank 0" in note for note in notes)
    assert tree(directory / "hub") == tree(directory / "afar-2/hub")


def test_a_url_that_is_not_written_to_is_refused(world: World) -> None:
    assert "name the path itself: /tmp/x" in failure(world, "file-url").text
    assert "results are not written to this store" in failure(world, "read-only").text


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_leaves_nothing_that_looks_whole(
    victim: int, bucket: Bucket, tmp_path: Path
) -> None:
    target = f"s3://{BUCKET}/lost-{victim}"
    (tmp_path / "victim").write_text(str(victim))
    (tmp_path / "target").write_text(target)
    run_ranks(lost_savers.__file__, 2, tmp_path, timeout_s=120)

    heard = json.loads((tmp_path / "heard.json").read_text())
    assert heard["error"] == "DcpconvError", heard
    assert "a rank was lost while saving; nothing was saved" in heard["text"]
    assert "model.safetensors.index.json" not in bucket.contents(f"lost-{victim}")
    model = torch.nn.Sequential(torch.nn.Linear(300, 7), torch.nn.Linear(7, 300))
    save_weights(model, target, max_file_size=8500)
    found = open_checkpoint(target)
    assert found.tensors.keys() == model.state_dict().keys()
    left = {name for name in bucket.contents(f"lost-{victim}") if "json" not in name}
    assert left == set(found.files)
