"""Results in a bucket: what is there is replaced whole or not at all, however a conversion ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dcpconv import check, convert
from dcpconv.core.errors import TargetExistsError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.stores.objects import ObjectsStore
from dcpconv.stores.store import Info
from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf
from support.machine.fault_proxy import spoiling
from support.machine.s3_server import BUCKET, Bucket, point_to

MIB = 1 << 20


def test_an_existing_target_is_replaced_only_where_that_is_asked_for(
    bucket: Bucket, model: Path
) -> None:
    target = f"s3://{BUCKET}/out"
    convert(model, target, form="hf", max_file_size=MIB)
    before = bucket.contents("out")
    with pytest.raises(TargetExistsError, match="the target exists"):
        convert(model, target, form="hf", max_file_size=MIB)
    assert bucket.contents("out") == before
    convert(model, target, form="dcp", to="lingua", overwrite=True)
    after = bucket.keys("out")
    assert f"out/{'.metadata'}" in after
    assert not [key for key in after if key.endswith((".safetensors", ".index.json"))]
    assert check(target, against=model)


def test_an_old_checkpoint_is_whole_until_the_new_one_is(
    bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every request while it is replaced, what readers find is one of the two."""
    target = f"s3://{BUCKET}/out"
    convert(model, target, form="hf", max_file_size=MIB)
    old = json.loads(bucket.read("out/model.safetensors.index.json"))["weight_map"]
    seen = []

    def look(method: str, _path: str) -> str:
        if method in {"PUT", "POST", "DELETE"}:
            there = {key.rpartition("/")[2] for key in bucket.keys("out")}
            index = json.loads(bucket.read("out/model.safetensors.index.json"))["weight_map"]
            seen.append((index == old, {*index.values()} <= there))
        return ""

    with spoiling(bucket.url, look) as proxy:
        point_to(proxy.url, monkeypatch)
        convert(model, target, form="hf", max_file_size=2 * MIB, overwrite=True)
    assert {is_old for is_old, _ in seen} == {True, False}
    assert all(is_whole for _, is_whole in seen)


def test_of_two_conversions_one_wins_and_the_other_says_so(
    bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one ends while the first one is about to."""
    target = f"s3://{BUCKET}/out"
    other: list[str] = []

    def second(method: str, path: str) -> str:
        is_commit = method == "PUT" and path.partition("?")[0].endswith("/out/.metadata")
        if is_commit and not other:
            other.append(path)
            point_to(bucket.url, monkeypatch)
            convert(model, target, form="dcp", to="stored")
        return ""

    with spoiling(bucket.url, second) as proxy:
        point_to(proxy.url, monkeypatch)
        with pytest.raises(TargetExistsError, match="another conversion finished"):
            convert(model, target, form="dcp", to="lingua")
    point_to(bucket.url, monkeypatch)
    assert open_checkpoint(target).tensors.keys() == llama_shapes().keys()
    assert len([key for key in bucket.keys("out") if key.endswith(".distcp")]) == 1


BIG = 150_000
"""Rows of the embeddings: a result of 58 MB, which is sent in four parts."""


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    """Of 23 MB."""
    shapes = {k: (60_000, s[1]) if s[0] == 131 else s for k, s in llama_shapes().items()}
    return write_hf(tmp_path / "medium", shapes, config={**CONFIG, "vocab_size": 60_000})


@pytest.fixture
def big(tmp_path: Path) -> Path:
    shapes = {k: (BIG, s[1]) if s[0] == 131 else s for k, s in llama_shapes().items()}
    return write_hf(tmp_path / "big", shapes, config={**CONFIG, "vocab_size": BIG})


HELD: dict[str, dict[str, Any]] = {"out.pth": {"to": "lingua"}, "out": {"form": "hf"}}
"""Results that are one object, or one beside a parameter file: nothing else makes them whole."""


@pytest.mark.parametrize("size", [5, 32])
@pytest.mark.parametrize("name", HELD)
def test_what_somebody_else_made_meanwhile_stays(
    name: str, size: int, bucket: Bucket, medium: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object of several parts, and one that is sent in one request."""
    monkeypatch.setattr("dcpconv.engine.uploading.PART", size * MIB)
    key = name if name.endswith(".pth") else f"{name}/model.safetensors"

    def second(method: str, path: str) -> str:
        is_last = f"/{key}" in path and (method == "PUT" or "uploadId" in path)
        if is_last and not bucket.keys(key):
            bucket.client.put_object(Bucket=BUCKET, Key=key, Body=b"another")
        return ""

    with spoiling(bucket.url, second) as proxy:
        point_to(proxy.url, monkeypatch)
        with pytest.raises(TargetExistsError, match="another conversion finished"):
            convert(medium, f"s3://{BUCKET}/{name}", **HELD[name])
    assert bucket.keys() == [key]
    assert bucket.read(key) == b"another"
    assert not bucket.unfinished()


@pytest.mark.parametrize("size", [5, 32])
@pytest.mark.parametrize("lost", ["", "uploadId", "copy"])
def test_a_file_is_replaced_where_that_is_asked_for_and_made_once(
    lost: str, size: int, bucket: Bucket, medium: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the answers to the request that makes it are lost."""
    monkeypatch.setattr("dcpconv.engine.uploading.PART", size * MIB)
    target = f"s3://{BUCKET}/out.pth"

    def cut(method: str, path: str) -> str:
        is_end = method == "POST" and "uploadId" in path
        is_copy = is_end and ".dcpconv-" not in path
        return "cut after" if is_end and lost and (lost != "copy" or is_copy) else ""

    with spoiling(bucket.url, cut) as proxy:
        point_to(proxy.url, monkeypatch)
        convert(medium, target, to="lingua")
    assert bool(proxy.faults) == bool(lost and size == 5)
    point_to(bucket.url, monkeypatch)
    first = bucket.read("out.pth")
    with pytest.raises(TargetExistsError):
        convert(medium, target, to="lingua")
    convert(medium, target, to="stored", overwrite=True)
    assert bucket.keys() == ["out.pth"]
    assert bucket.read("out.pth") != first
    assert not bucket.unfinished()


def test_of_two_that_begin_at_once_none_writes_over_the_other(
    bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "out/.dcpconv-unfinished-0123"

    def second(method: str, path: str) -> str:
        if method == "PUT" and "unfinished" in path:
            bucket.client.put_object(Bucket=BUCKET, Key=other, Body=b"[]")
        return ""

    with spoiling(bucket.url, second) as proxy:
        point_to(proxy.url, monkeypatch)
        with pytest.raises(TargetExistsError, match="began this target at the same time"):
            convert(model, f"s3://{BUCKET}/out", to="lingua")
    assert bucket.keys() == [other]


MOMENTS = [
    ("uploads=", "out", signal.SIGINT),
    ("partNumber=1", "out", signal.SIGTERM),
    ("partNumber=1", "out.pth", signal.SIGINT),
    ("partNumber=4", "out", signal.SIGINT),
    ("partNumber=4", "out.pth", signal.SIGTERM),
]
"""Requests at which a conversion is interrupted: before its first part is sent, and later."""


@pytest.mark.parametrize(("moment", "name", "number"), MOMENTS)
def test_an_interrupted_conversion_leaves_nothing_and_can_be_run_again(
    moment: str, name: str, number: signal.Signals, bucket: Bucket, big: Path
) -> None:
    target = f"s3://{BUCKET}/{name}"

    sent: list[str] = []

    def slowly(method: str, path: str) -> str:
        if moment in path and not sent:  # a copy has parts, too
            sent.append(path)
            run.send_signal(number)
        if method == "PUT" and "partNumber" in path:
            time.sleep(0.1)
        return ""

    with spoiling(bucket.url, slowly) as proxy:
        command = [sys.executable, "-m", "dcpconv", "convert", str(big), target, "--to", "lingua"]
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 130, told
    assert bucket.keys(name) == []
    assert bucket.unfinished() == []
    convert(big, target, to="lingua")
    assert check(target, against=big)


def test_an_interruption_at_the_last_moment_leaves_the_new_checkpoint(
    bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its index is made, and nobody has said so yet."""
    target = f"s3://{BUCKET}/out"
    convert(model, target, form="hf", max_file_size=MIB)
    create = ObjectsStore.create

    def interrupted(self: ObjectsStore, key: str, data: bytes, *, replaces: Info | None) -> bool:
        made = create(self, key, data, replaces=replaces)
        if key.endswith(".index.json"):
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(ObjectsStore, "create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model, target, form="hf", max_file_size=2 * MIB, overwrite=True)
    index = json.loads(bucket.read("out/model.safetensors.index.json"))["weight_map"]
    assert all("-r" in name for name in index.values())
    assert check(target, against=model)


def test_a_commit_whose_answers_are_lost_is_a_commit(
    bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"s3://{BUCKET}/out"

    def lost(method: str, path: str) -> str:
        return "cut after" if method == "PUT" and path.endswith("/.metadata") else ""

    with spoiling(bucket.url, lost) as proxy:
        point_to(proxy.url, monkeypatch)
        convert(model, target, to="lingua")
    assert proxy.faults
    point_to(bucket.url, monkeypatch)
    assert check(target, against=model)
    assert len(bucket.keys("out")) == 3


def test_what_a_killed_conversion_left_is_in_nobodys_way(bucket: Bucket, model: Path) -> None:
    convert(model, f"s3://{BUCKET}/out", to="lingua", chunks=2)
    names = sorted(bucket.contents("out"))
    listed = [f"out/{name}" for name in names if name != ".metadata"] + ["out/.metadata"]
    mark = "out/.dcpconv-unfinished-1234"
    bucket.client.put_object(Bucket=BUCKET, Key=mark, Body=json.dumps(listed).encode())
    bucket.client.delete_object(Bucket=BUCKET, Key="out/.metadata")
    convert(model, f"s3://{BUCKET}/out", to="lingua", chunks=2)
    assert check(f"s3://{BUCKET}/out", against=model)
    left = {key for key in bucket.keys("out") if key in listed}
    assert {name.rpartition("/")[2] for name in left} == {".metadata", "params.json"}
    assert mark not in bucket.keys("out")
