"""Google's and Azure's buckets: read, written, made and replaced on condition, interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dcpconv import check, convert
from dcpconv.core.errors import TargetExistsError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.schemes import path_of
from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf
from support.machine.azure_server import serving_azure
from support.machine.fault_proxy import spoiling
from support.machine.gcs_server import serving_fake_gcs, serving_gcs
from support.machine.s3_server import serving_s3

BIG = 150_000
"""Rows of the embeddings: a result of 58 MB, which is sent in four parts."""


@dataclass(frozen=True, slots=True)
class Cloud:
    """A bucket.

    Attributes:
        url: Its own.
        server: Where requests go.
        variable: What tells obstore so.
        part: What the request for a part has in its query.
        unfinished: Uploads that neither ended nor were aborted.
    """

    url: str
    server: str
    variable: str
    part: str
    unfinished: Callable[[], list[str]]

    def keys(self, prefix: str) -> list[str]:
        """Of all objects below a prefix."""
        path = path_of(f"{self.url}/{prefix}")
        assert isinstance(path, RemotePath)
        return sorted(path.origin.store.walk(prefix))


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setattr("dcpconv.stores.fetching._FIRST_PAUSE", 0.001)
    if request.param == "az":
        with serving_azure(monkeypatch) as url:
            # Azure drops blocks of its own accord that no blob is made of.
            yield Cloud("az://tests", url, "AZURITE_BLOB_STORAGE_URL", "comp=block&", list)
        return
    with serving_s3(monkeypatch) as bucket, serving_gcs(bucket.url) as google:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        name = "STORAGE_EMULATOR_HOST"
        yield Cloud("gs://tests", google.url, name, "partNumber", bucket.unfinished)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    shapes = {k: (BIG, s[1]) if s[0] == 131 else s for k, s in llama_shapes().items()}
    return write_hf(tmp_path / "model", shapes, config={**CONFIG, "vocab_size": BIG})


def test_a_bucket_is_read_and_written(cloud: Cloud, big: Path, tmp_path: Path) -> None:
    convert(big, f"{cloud.url}/dcp", to="lingua")
    assert check(f"{cloud.url}/dcp", against=big)
    convert(f"{cloud.url}/dcp", f"{cloud.url}/hf", form="hf", max_file_size=20 << 20)
    convert(big, f"{cloud.url}/one.pth", to="lingua")
    convert(big, tmp_path / "one.pth", to="lingua")
    there, here = open_checkpoint(f"{cloud.url}/one.pth"), open_checkpoint(tmp_path / "one.pth")
    assert there.tensors == here.tensors
    convert(f"{cloud.url}/hf", tmp_path / "back", form="dcp", to="stored")
    assert check(tmp_path / "back", against=big)
    assert not cloud.unfinished()


def test_a_bucket_of_fake_gcs_server_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    model = write_hf(tmp_path / "model", llama_shapes(), config=CONFIG, files=2)
    with serving_fake_gcs(model, "model") as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        assert open_checkpoint("gs://tests/model").tensors == open_checkpoint(model).tensors
        convert("gs://tests/model", tmp_path / "out", to="lingua")
    assert check(tmp_path / "out", against=model)


def test_a_checkpoint_is_replaced_only_where_that_is_asked_for(cloud: Cloud, big: Path) -> None:
    target = f"{cloud.url}/hf"
    convert(big, target, form="hf", max_file_size=20 << 20)
    old = cloud.keys("hf")
    with pytest.raises(TargetExistsError):
        convert(big, target, form="hf")
    assert cloud.keys("hf") == old
    convert(big, target, form="hf", max_file_size=10 << 20, overwrite=True)
    new = cloud.keys("hf")
    assert not {key for key in old if "of" in key} & {*new}
    assert check(target, against=big)


def test_an_object_is_made_if_none_is_there_and_replaced_if_it_is_as_it_was(cloud: Cloud) -> None:
    path = path_of(f"{cloud.url}/x")
    assert isinstance(path, RemotePath)
    store = path.origin.store
    assert store.create("x", b"one", replaces=None)
    assert not store.create("x", b"two", replaces=None)
    assert store.create("x", b"one", replaces=None)  # as if the first answer had been lost
    first = store.look_at("x")
    assert store.create("x", b"two", replaces=first)
    assert not store.create("x", b"three", replaces=first)
    store.forget()
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(
    number: signal.Signals, cloud: Cloud, big: Path
) -> None:
    sent: list[str] = []

    def slowly(method: str, path: str) -> str:
        if method == "PUT" and cloud.part in path:
            if not sent:
                sent.append(path)
                run.send_signal(number)
            time.sleep(0.1)
        return ""

    with spoiling(cloud.server, slowly) as proxy:
        target = f"{cloud.url}/out"
        command = [sys.executable, "-m", "dcpconv", "convert", str(big), target, "--to", "lingua"]
        environment = {**os.environ, cloud.variable: proxy.url}
        run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 130, told
    assert cloud.keys("out") == []
    assert not cloud.unfinished()
    convert(big, target, to="lingua")
    assert check(target, against=big)
