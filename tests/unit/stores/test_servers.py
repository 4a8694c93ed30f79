"""Static servers, Azure's emulator and fsspec: the same bytes by other ways."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import check, convert
from dcpconv.core.errors import SourceChangedError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.stores.schemes import path_of
from dcpconv.stores.store import StoreError
from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf
from support.machine.static_server import static

KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of Azure's emulator; the same for everybody (``learn.microsoft.com``, "Azurite")."""


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("count", [1, 3])
def test_a_directory_of_a_static_server_is_read(count: int, tmp_path: Path) -> None:
    model = write_hf(tmp_path / "www" / "model", llama_shapes(), files=count, config=CONFIG)
    with static(tmp_path / "www") as url:
        assert open_checkpoint(f"{url}/model").tensors == open_checkpoint(model).tensors
        convert(f"{url}/model", tmp_path / "afar", to="lingua")
    convert(model, tmp_path / "here", to="lingua")
    assert files(tmp_path / "afar") == files(tmp_path / "here")


def test_a_file_and_a_dcp_of_a_static_server_are_read(tmp_path: Path) -> None:
    state = {key: torch.randn(shape) for key, shape in llama_shapes().items()}
    (tmp_path / "www").mkdir()
    torch.save(state, tmp_path / "www" / "model.pth")
    save(state, checkpoint_id=tmp_path / "www" / "dcp", no_dist=True)
    with static(tmp_path / "www") as url:
        for name in ("model.pth", "dcp"):
            here = tmp_path / "www" / name
            assert open_checkpoint(f"{url}/{name}").tensors == open_checkpoint(here).tensors


def test_a_file_that_changes_on_a_server_is_told(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "www" / "model", llama_shapes())
    with static(tmp_path / "www") as url:
        source = path_of(f"{url}/model")
        open_checkpoint(source)
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        with pytest.raises(SourceChangedError):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_without_ranges_is_told(tmp_path: Path) -> None:
    write_hf(tmp_path / "www" / "model", llama_shapes(), config=None)
    with static(tmp_path / "www", ranges=False) as url, pytest.raises(StoreError) as caught:
        open_checkpoint(f"{url}/model")
    assert "range" in str(caught.value)


def test_what_only_fsspec_knows_is_read_through_it(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    model = write_hf(tmp_path / "model", llama_shapes(), files=2)
    memory = fsspec.filesystem("memory")
    for file in model.iterdir():
        memory.pipe_file(f"/tests/model/{file.name}", file.read_bytes())
    try:
        convert("memory://tests/model", tmp_path / "afar", to="lingua")
    finally:
        memory.rm("/tests", recursive=True)
    convert(model, tmp_path / "here", to="lingua")
    assert files(tmp_path / "afar") == files(tmp_path / "here")
    with pytest.raises(StoreError, match="not written to this store"):
        convert(model, "memory://tests/out", to="lingua")


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A container of Azure's emulator (``npm install azurite``, in ``PATH``)."""
    pytest.importorskip("obstore")
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not in PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    options += ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        _create_container(port)
        yield "az://tests"
    finally:
        server.terminate()
        server.wait()


def _create_container(port: int) -> None:
    """obstore makes none; a request of the service's own, signed with its shared key."""
    date, version, account = email.utils.formatdate(usegmt=True), "2021-08-06", "devstoreaccount1"
    signed = (
        "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n"
        f"/{account}/{account}/tests\nrestype:container"
    )
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {account}:{base64.b64encode(digest).decode()}",
        "Content-Length": "0",
    }
    url = f"http://127.0.0.1:{port}/{account}/tests?restype=container"
    for _ in range(100):
        with suppress(OSError), urlopen(Request(url, method="PUT", headers=headers)):
            return
        time.sleep(0.1)
    raise AssertionError("the emulator does not answer")


def test_azure_is_read_and_written(container: str, tmp_path: Path) -> None:
    shapes = {k: (150_000, s[1]) if s[0] == 131 else s for k, s in llama_shapes().items()}
    model = write_hf(tmp_path / "model", shapes, config={**CONFIG, "vocab_size": 150_000})
    os.environ.pop("AZURE_STORAGE_SAS_TOKEN", None)
    convert(model, f"{container}/dcp", to="lingua")
    assert check(f"{container}/dcp", against=model)
    convert(f"{container}/dcp", f"{container}/hf", form="hf", max_file_size=20 << 20)
    convert(model, f"{container}/hf", form="hf", max_file_size=10 << 20, overwrite=True)
    convert(model, tmp_path / "here", form="dcp", to="stored")
    convert(f"{container}/hf", tmp_path / "back", form="dcp", to="stored")
    there, here = open_checkpoint(tmp_path / "back"), open_checkpoint(tmp_path / "here")
    assert there.tensors.keys() == here.tensors.keys()
    assert check(tmp_path / "back", against=model)
