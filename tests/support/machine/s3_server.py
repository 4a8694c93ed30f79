"""An S3 server for tests: moto's, in threads of this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

BUCKET = "tests"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket that is there.

    Attributes:
        url: Of the server.
        client: boto3's, which nothing stands between and the server.
    """

    url: str
    client: Any

    def upload(self, path: Path, key: str) -> str:
        """A file, or everything below a directory, under a key; returns its URL."""
        if path.is_file():
            self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        for file in sorted(path.rglob("*")):
            if file.is_file():
                self.upload(file, f"{key}/{file.relative_to(path)}")
        return f"s3://{BUCKET}/{key}"

    def keys(self, prefix: str = "") -> list[str]:
        """Of all objects below a prefix."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for item in found.get("Contents", ())]

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Objects below a prefix, by the rest of their keys."""
        return {
            key[len(prefix) :].lstrip("/"): self.read(key)
            for key in self.keys(prefix)
            if key == prefix or key.startswith(f"{prefix}/")
        }

    def read(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def unfinished(self) -> list[str]:
        """Keys of uploads in parts that neither ended nor were aborted."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET)
        return [item["Key"] for item in found.get("Uploads", ())]


@contextmanager
def serving_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A server with one bucket, to which the environment points."""
    moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("obstore", reason="obstore is not installed")
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        point_to(url, monkeypatch)
        with urlopen(Request(f"{url}/moto-api/reset", method="POST")):
            pass  # what earlier servers of this process held
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket=BUCKET)
        yield Bucket(url, client)
        client.close()
    finally:
        server.stop()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user sets to reach a server of their own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
