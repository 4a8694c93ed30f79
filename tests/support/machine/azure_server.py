"""Azure's blob storage for tests: azurite, where it is installed (``npm install azurite``)."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.request import Request, urlopen

import pytest

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of Azure's emulator; the same for everybody (``learn.microsoft.com``, "Azurite")."""


@contextmanager
def serving_azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with the container ``tests``; its URL, for ``AZURITE_BLOB_STORAGE_URL``."""
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
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", url)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        monkeypatch.delenv("AZURE_STORAGE_SAS_TOKEN", raising=False)
        _create_container(url)
        yield url
    finally:
        server.terminate()
        server.wait()


def _create_container(server: str) -> None:
    """obstore makes none; a request of the service's own, signed with its shared key."""
    date, version = email.utils.formatdate(usegmt=True), "2021-08-06"
    signed = (
        "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n"
        f"/{ACCOUNT}/{ACCOUNT}/tests\nrestype:container"
    )
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        "Content-Length": "0",
    }
    url = f"{server}/{ACCOUNT}/tests?restype=container"
    for _ in range(600):
        with suppress(OSError), urlopen(Request(url, method="PUT", headers=headers)):
            return
        time.sleep(0.1)
    raise AssertionError("the emulator does not answer")
