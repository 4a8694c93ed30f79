"""A server that speaks as much of the hub's protocol as a download needs, and counts bytes.

Source: what huggingface_hub asks for: ``GET /api/models/ORG/NAME[/revision/REV]`` for the list of
files, ``HEAD`` and ``GET /ORG/NAME/resolve/REV/FILE`` for the files, with ``Range``; to write,
``POST .../preupload/REV``, ``.../info/lfs/objects/batch`` and ``.../commit/REV``, and ``PUT``;
of a bucket, ``GET /api/buckets/ORG/NAME/tree[/PREFIX]``, ``POST .../paths-info`` and
``GET /buckets/ORG/NAME/resolve/PATH``.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

_SMALL = 10_000
"""Bytes from which a file is uploaded by itself, before the commit."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub with one model.

    Attributes:
        url: For ``HF_ENDPOINT``.
        served: Bytes of files sent, by name.
        asked: Method and path of every request.
        objects: What was uploaded, by its hash.
        has_moved: Whether somebody else has committed since it was looked at.
    """

    def __init__(self, name: str, directory: Path, *, reported: dict[str, int] | None) -> None:
        self.name = name
        self.directory = directory
        self.reported = reported or {}
        self.served: dict[str, int] = {}
        self.asked: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.has_moved = False
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def nodes(self, prefix: str = "") -> list[dict[str, object]]:
        """Files of a bucket below a prefix, in directories, too."""
        return [
            {
                "type": "file",
                "path": name,
                "size": file.stat().st_size,
                "xetHash": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in sorted(self.directory.rglob("*"))
            if file.is_file()
            and (name := file.relative_to(self.directory).as_posix()).startswith(prefix)
        ]

    def files(self) -> list[dict[str, object]]:
        return [
            {"rfilename": file.name, "size": self.reported.get(file.name, file.stat().st_size)}
            for file in sorted(self.directory.iterdir())
        ]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            del format, args

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_PUT(self) -> None:
            hub.asked.append(f"PUT {self.path}")
            hub.objects[self.path.rpartition("/")[2]] = self._body()
            self._send(200, b"", {}, with_body=True)

        def do_POST(self) -> None:
            hub.asked.append(f"POST {self.path}")
            body, path = self._body(), urlsplit(self.path).path
            if path.endswith("/objects/batch"):
                objects = [
                    {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                answer: object = {"objects": objects, "transfer": "basic"}
            elif path.endswith("/paths-info"):
                wanted = json.loads(body)["paths"]
                answer = [node for node in hub.nodes() if node["path"] in wanted]
            elif "/preupload/" in path:
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["size"] > _SMALL else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                answer = {"files": modes}
            elif "/commit/" in path and hub.has_moved:
                self._send(412, b"{}", {}, with_body=True)
                return
            elif "/commit/" in path:
                self._commit([json.loads(line) for line in body.splitlines()])
                answer = {"commitUrl": f"{hub.url}/{hub.name}/commit/{COMMIT}", "success": True}
                answer["commitOid"] = COMMIT
            else:
                answer = {"url": f"{hub.url}/{hub.name}"}
            self._send(200, json.dumps(answer).encode(), {}, with_body=True)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _commit(self, lines: list[dict[str, Any]]) -> None:
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    (hub.directory / value["path"]).write_bytes(b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    (hub.directory / value["path"]).write_bytes(hub.objects[value["oid"]])
                elif line["key"] == "deletedFile":
                    (hub.directory / value["path"]).unlink()

        def _answer(self, *, with_body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path)
            path = path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
            api = re.fullmatch(rf"/api/models/{re.escape(hub.name)}(?:/revision/(.+))?", path)
            tree = re.fullmatch(rf"/api/models/{re.escape(hub.name)}/tree/([^/]+)", path)
            file = re.fullmatch(rf"/{re.escape(hub.name)}/resolve/([^/]+)/(.+)", path)
            bucket = re.fullmatch(rf"/(?:api/)?buckets/{re.escape(hub.name)}(/.+)", path)
            if bucket:
                self._of_bucket(bucket[1], with_body=with_body)
            elif api and api[1] in {None, "main", COMMIT}:
                answer = {"id": hub.name, "sha": COMMIT, "siblings": hub.files()}
                self._send(200, json.dumps(answer).encode(), {}, with_body=with_body)
            elif tree and tree[1] in {"main", COMMIT}:
                nodes = [
                    {
                        "type": "file",
                        "path": node["rfilename"],
                        "size": node["size"],
                        "oid": "0" * 40,
                    }
                    for node in hub.files()
                ]
                self._send(200, json.dumps(nodes).encode(), {}, with_body=with_body)
            elif file and file[1] in {"main", COMMIT} and (hub.directory / file[2]).is_file():
                self._file(file[2], with_body=with_body)
            else:
                code = "RevisionNotFound" if api or file else "RepoNotFound"
                self._send(404, b"{}", {"X-Error-Code": code}, with_body=with_body)

        def _of_bucket(self, rest: str, *, with_body: bool) -> None:
            what, _, name = rest.strip("/").partition("/")
            if what == "tree":
                nodes = hub.nodes(f"{name}/" if name else "")
                self._send(200, json.dumps(nodes).encode(), {}, with_body=with_body)
            elif (hub.directory / name).is_file():
                self._file(name, with_body=with_body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)

        def _file(self, name: str, *, with_body: bool) -> None:
            path = hub.directory / name
            size = path.stat().st_size
            headers = {
                "ETag": f'"{hashlib.sha1(name.encode()).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop, status = 0, size, 200
            if found:
                start, status = int(found[1]), 206
                stop = min(size, int(found[2]) + 1) if found[2] else size
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start) if with_body else b""
            if with_body:
                with hub.lock:
                    hub.served[name] = hub.served.get(name, 0) + len(data)
            self._send(status, data, headers, with_body=with_body, nbytes=stop - start)

        def _send(
            self,
            status: int,
            data: bytes,
            headers: dict[str, str],
            *,
            with_body: bool,
            nbytes: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if nbytes is None else nbytes))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

    return Handler


@contextmanager
def serving(
    directory: Path, *, name: str = "org/tiny", reported: dict[str, int] | None = None
) -> Iterator[Hub]:
    """A hub whose one model is a directory.

    Args:
        directory: Its files; no directories in it.
        name: ``org/name``.
        reported: Sizes to state that differ from the files'.
    """
    hub = Hub(name, directory, reported=reported)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def point_to(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does for a process that starts with it."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
