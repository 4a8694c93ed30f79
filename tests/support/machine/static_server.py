"""A server of files that lists nothing: ranges, ETags and what is asked for on condition."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest


@contextmanager
def static(directory: Path, *, ranges: bool = True) -> Iterator[str]:
    """A server of files: the URL of a directory."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            del format, args

        def do_GET(self) -> None:
            file = directory / self.path.lstrip("/")
            if not file.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = file.read_bytes()
            whole, tag = len(data), hashlib.sha1(data).hexdigest()
            asked = self.headers.get("Range", "") if ranges else ""
            if self.headers.get("If-Match", f'"{tag}"') != f'"{tag}"':
                self.send_response(412)
                data = b""
            elif asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                data = data[int(first) : int(last) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            else:
                self.send_response(200)
            self.send_header("ETag", f'"{tag}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815 - as the base class does

    pytest.importorskip("obstore")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
