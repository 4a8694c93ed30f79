"""A proxy in front of an HTTP server that counts requests, and spoils some of them.

What it does to a request is decided by whoever makes it: by a list, or by a random choice with a
seed.  It answers late, refuses, cuts connections before, while or after the server has done what it
was asked, sends less than it says, and says another ETag.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from support.machine.relay import Answer, Relay

FAULTS = (
    "late",
    "429",
    "500",
    "503",
    "cut before",
    "cut after",
    "cut in the middle",
    "shorter",
    "other tag",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Attributes:
        method: Its method.
        path: With the query.
        range: Its ``Range``, or empty.
        fault: What was done to it, or empty.
    """

    method: str
    path: str
    range: str
    fault: str


class Proxy:
    """A proxy.

    Args:
        backend: URL of the server.
        choose: The fault of a request, by its method and path; empty for none.

    Attributes:
        url: Its own.
        asked: Every request so far.
    """

    def __init__(self, backend: str, choose: Callable[[str, str], str]) -> None:
        self.backend = urlsplit(backend)
        self.choose = choose
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def faults(self) -> int:
        """Requests that were spoilt."""
        return sum(bool(one.fault) for one in self.asked)

    def gets(self, *, of: str) -> list[Asked]:
        """Requests for the bytes of objects whose paths contain a text."""
        return [
            one for one in self.asked if one.method == "GET" and of in one.path.partition("?")[0]
        ]


def at_random(seed: int, share: float) -> Callable[[str, str], str]:
    """Spoils this share of all requests, each in one of all ways."""
    rng = random.Random(seed)

    def choose(method: str, path: str) -> str:
        del method, path
        return rng.choice(FAULTS) if rng.random() < share else ""

    return choose


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(Relay):
        def _any(self) -> None:
            body = self.body()
            with proxy.lock:
                fault = proxy.choose(self.command, self.path)
                asked = Asked(self.command, self.path, self.headers.get("Range", ""), fault)
                proxy.asked.append(asked)
            if fault == "late":
                time.sleep(0.02)
            if fault.isdigit():
                self._answer(Answer(int(fault), {}, b""))
                return
            if fault == "cut before":
                self._cut()
                return
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            answer = self.relayed(proxy.backend.netloc, body, headers)
            if fault == "cut after":
                self._cut()
                return
            if fault == "other tag" and "etag" in answer.headers and self.command == "GET":
                answer.headers["etag"] = '"another"'
            if fault == "shorter" and self.command == "GET" and answer.data:
                answer = answer._replace(data=answer.data[: len(answer.data) // 2])
            self._answer(answer, stops=fault == "cut in the middle")

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any  # noqa: N815 - as the base class

        def _answer(self, answer: Answer, *, stops: bool = False) -> None:
            if not self.begin_answer(answer):
                return
            if stops and answer.data:
                self.wfile.write(answer.data[: len(answer.data) // 2])
                self._cut()
            else:
                self.wfile.write(answer.data)

        def _cut(self) -> None:
            """Reset the connection, as a machine does that has lost it."""
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
            self.connection.close()
            self.close_connection = True

    return Handler


@contextmanager
def spoiling(backend: str, choose: Callable[[str, str], str] = lambda *_: "") -> Iterator[Proxy]:
    """A proxy in front of a server; without a choice it only counts."""
    proxy = Proxy(backend, choose)
    thread = threading.Thread(target=proxy.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()
