"""What servers of the tests do that stand before another one."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple

_OF_THE_HOP = frozenset({"connection", "content-length", "transfer-encoding", "date", "server"})
"""Headers that a server makes itself."""


class Answer(NamedTuple):
    """What the server behind says; names of headers are in small letters."""

    status: int
    headers: dict[str, str]
    data: bytes


class Relay(BaseHTTPRequestHandler):
    """Prints nothing, and takes a client that has gone for no fault."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            return  # the client has gone

    def body(self) -> bytes:
        """What the client sends."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def relayed(self, backend: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """What the server at ``host:port`` answers to the same request with these headers."""
        connection = http.client.HTTPConnection(backend, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(headers))
            found = connection.getresponse()
            kept = {name.lower(): value for name, value in found.getheaders()}
            return Answer(found.status, kept, found.read())
        finally:
            connection.close()

    def begin_answer(self, answer: Answer) -> bool:
        """Send what stands before the data; returns whether data follows."""
        is_head = self.command == "HEAD"
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name not in _OF_THE_HOP:
                self.send_header(name, value)
        length = answer.headers.get("content-length", "0") if is_head else str(len(answer.data))
        self.send_header("Content-Length", length)
        self.end_headers()
        return not is_head
