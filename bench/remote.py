"""How fast, and in how much memory, does a checkpoint come from a server, beside its peers?

    python -m bench.remote --gb 1 --work out

Files of nginx against a plain concurrent download of the same bytes to the same disk; a DCP of
nginx, and one in a bucket of moto's server, through ``CheckpointReader``, s3torchconnector's reader
and torch's reader over fsspec, each where it is installed; a relabelled copy from bucket to bucket
against a plain one of the same client.  Every row is a fresh process, rows take turns, and the best
of all rounds counts.  moto is written in Python: it says which reader waits less for the same
server, not how fast S3 is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.data import llama_config, llama_shapes, write_llama, write_safetensors
from bench.measure import run_python, workplace
from dcpconv import convert

TARGET = 1 / 0.85
"""Of the time of a plain concurrent download."""

ROUNDS = 3

_TENSORS = 40
"""In the bucket, of 4 MiB each."""

_ROWS = 32_000
"""Of the embeddings of what is copied from bucket to bucket."""

_DOWNLOAD = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import obstore
from obstore.store import HTTPStore

url, name, out = sys.argv[1:]
store = HTTPStore.from_url(url, client_options={"allow_http": True})
nbytes, part = obstore.head(store, name)["size"], 16 << 20
fd = os.open(out, os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, nbytes)

def fetch(offset):
    length = min(part, nbytes - offset)
    os.pwrite(fd, obstore.get_range(store, name, start=offset, length=length), offset)

with ThreadPoolExecutor(16) as pool:
    list(pool.map(fetch, range(0, nbytes, part)))
os.fsync(fd)
"""

_CONVERT = """
import sys
from dcpconv import convert

source, target, to = sys.argv[1:]
convert(source, target, form="dcp", to=to)
"""

_FILL = """
import sys
import torch
from torch.distributed.checkpoint.state_dict_loader import load

state = {"x": {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items()}}
load(state, storage_reader=READER, no_dist=True)
"""

_OURS = ("dcpconv", "from dcpconv import CheckpointReader", "CheckpointReader(URL)")
_TORCH = "from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader"

_OF_SERVERS = {
    "CheckpointReader": _OURS,
    "torch over fsspec": ("aiohttp", _TORCH, "FsspecReader(URL)"),
}
"""Package, imports and expression of every reader that reads from nginx."""

_OF_BUCKETS = {
    "CheckpointReader": _OURS,
    "s3torchconnector": (
        "s3torchconnector",
        """from s3torchconnector import S3ClientConfig
from s3torchconnector.dcp import S3StorageReader""",
        "S3StorageReader('us-east-1', URL, S3ClientConfig(force_path_style=True))",
    ),
    "torch over fsspec": ("s3fs", _TORCH, "FsspecReader(URL)"),
}
"""The same of those that read from S3."""

_COPY = """
import sys
from concurrent.futures import ThreadPoolExecutor
import obstore
from obstore.store import S3Store

source, target = sys.argv[1:]
store = S3Store("bench", client_options={"allow_http": True})
nbytes, part = obstore.head(store, source)["size"], 16 << 20

def fetch(offset):
    return obstore.get_range(store, source, start=offset, length=min(part, nbytes - offset))

with ThreadPoolExecutor(8) as pool:
    parts = pool.map(fetch, range(0, nbytes, part))
    obstore.put(store, target, parts, use_multipart=True, chunk_size=part, max_concurrency=4)
"""

_CONVERT_THERE = """
import sys
from dcpconv import convert

source, target, to = sys.argv[1:]
convert(source, target, form="dcp", to=to, overwrite=True)
"""


Case = tuple[str, tuple[str | os.PathLike[str], ...]]
"""Code of a fresh process, and its arguments."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """One row.

    Attributes:
        name: As printed.
        seconds: The fastest of all rounds.
        ratio: To the floor of its group.
        peak: Largest ``VmHWM``, in MiB.
        target: Ratio to reach, or ``None`` for a peer.
    """

    name: str
    seconds: float
    ratio: float
    peak: float
    target: float | None = None

    def __str__(self) -> str:
        verdict = "" if self.target is None or self.ratio <= self.target else "  above"
        return (
            f"{self.name:<40} {self.seconds:6.2f} s  {self.ratio:4.2f} x"
            f"  {self.peak:5.0f} MiB{verdict}"
        )


def rows(work: Path, *, gb: float = 1.0, rounds: int = ROUNDS) -> list[Fetched]:
    """Measure every case on a model of this size; none without obstore."""
    if find_spec("obstore") is None:
        return []
    model = write_llama(work / "www" / "model", gigabytes=gb)
    found = _of_server(model, work, rounds)
    if find_spec("moto") is not None:
        found += _of_bucket(model.parent, work, rounds)
    shutil.rmtree(work / "www")
    return found


def table(results: Sequence[Fetched]) -> str:
    """A line a row."""
    return "\n".join(map(str, results))


def _of_server(model: Path, work: Path, rounds: int) -> list[Fetched]:
    out = work / "fetched"
    with _static(model.parent) as (url, server):
        cases: dict[str, Case] = {
            f"plain download, 16 at once ({server})": (
                _DOWNLOAD,
                (f"{url}/", "model/model.safetensors", out),
            ),
            "convert http -> dcp, as stored": (_CONVERT, (f"{url}/model", out, "stored")),
            "convert http -> dcp --to lingua": (_CONVERT, (f"{url}/model", out, "lingua")),
        }
        found = _turns(cases, out, rounds, target=TARGET)
        shapes = _small(model.parent)
        convert(model.parent / "small", model.parent / "dcp", form="dcp", to="stored", root="x")
        cases = _loads(_OF_SERVERS, f"{url}/dcp", shapes, server)
        return found + _turns(cases, out, rounds, target=None)


def _small(www: Path) -> dict[str, tuple[int, int]]:
    """A model that a server written in Python serves in seconds."""
    shapes = {f"layers.{n}.weight": (2048, 1024) for n in range(_TENSORS)}
    (www / "small").mkdir(exist_ok=True)
    write_safetensors(www / "small" / "model.safetensors", shapes)
    return shapes


def _llama(directory: Path) -> Path:
    """A model of 250 MB that a table knows."""
    directory.mkdir()
    config = {**llama_config(layers=1), "vocab_size": _ROWS}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {**llama_shapes(layers=1), "model.embed_tokens.weight": (_ROWS, 2048)}
    write_safetensors(directory / "model.safetensors", shapes)
    return directory


def _loads(
    readers: Mapping[str, tuple[str, str, str]],
    url: str,
    shapes: Mapping[str, tuple[int, int]],
    server: str,
) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, (package, imports, reader) in readers.items():
        if find_spec(package) is not None:
            code = f"{imports}\nURL, SHAPES = {url!r}, {shapes!r}\nREADER = {reader}\n"
            cases[f"dcp.load from {server}, {name}"] = (code + _FILL, ())
    return cases


def _of_bucket(www: Path, work: Path, rounds: int) -> list[Fetched]:
    shapes = _small(www)
    with _bucket() as url:
        os.environ |= _environment(url)
        target = "s3://bench/dcp"
        convert(www / "small", target, form="dcp", to="stored", root="x")
        cases = _loads(_OF_BUCKETS, target, shapes, "moto")
        found = _turns(cases, work / "fetched", rounds, target=None)
        convert(_llama(www / "llama"), "s3://bench/hf", form="hf")
        there: dict[str, Case] = {
            "plain copy s3 -> s3 (moto)": (_COPY, ("hf/model.safetensors", "copy")),
            "convert s3 -> s3 --to lingua": (
                _CONVERT_THERE,
                ("s3://bench/hf", "s3://bench/lingua", "lingua"),
            ),
        }
        return found + _turns(there, work / "fetched", rounds, target=None)


def _turns(
    cases: dict[str, Case],
    out: Path,
    rounds: int,
    *,
    target: float | None,
) -> list[Fetched]:
    """Every case in turn; the first one is the floor."""
    seconds = {name: float("inf") for name in cases}
    peaks = dict.fromkeys(cases, 0.0)
    for _ in range(rounds):
        for name, (code, arguments) in cases.items():
            if out.is_dir():
                shutil.rmtree(out)
            out.unlink(missing_ok=True)
            cost = run_python(code, *arguments)
            seconds[name] = min(seconds[name], cost.seconds)
            peaks[name] = max(peaks[name], cost.peak)
    if out.is_dir():
        shutil.rmtree(out)
    floor = next(iter(seconds.values()))
    return [Fetched(n, s, s / floor, peaks[n], target) for n, s in seconds.items()]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def _static(directory: Path) -> Iterator[tuple[str, str]]:
    """A server of the files of a directory, and its name."""
    port, program = _free_port(), shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise SystemExit("nginx is not installed; nothing else serves files fast enough to measure")
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {scratch}/{kind};" for kind in kinds)
        config = Path(scratch, "nginx.conf")
        config.write_text(
            f"user root; daemon off; pid {scratch}/pid; error_log {scratch}/errors;\n"
            f"events {{}}\nhttp {{ access_log off; sendfile on; {temporary}\n"
            f"server {{ listen 127.0.0.1:{port}; root {directory.resolve()}; }} }}\n"
        )
        server = subprocess.Popen([program, "-c", str(config)])  # noqa: S603  found above
        try:
            _wait(port)
            yield f"http://127.0.0.1:{port}", "nginx"
        finally:
            server.terminate()
            server.wait()


@contextmanager
def _bucket() -> Iterator[str]:
    """Moto's server in a process of its own, with one bucket."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(  # noqa: S603  our own interpreter
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(port)
        url = f"http://127.0.0.1:{port}"
        import boto3  # noqa: PLC0415  comes with moto

        named = {"endpoint_url": url, "aws_access_key_id": "x", "aws_secret_access_key": "x"}
        boto3.client("s3", region_name="us-east-1", **named).create_bucket(Bucket="bench")
        yield url
    finally:
        server.terminate()
        server.wait()


def _environment(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _wait(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"nothing answers on port {port}")


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model, in GB")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of every row")
    parser.add_argument("--work", type=Path, default=Path("out"))
    options = parser.parse_args()
    with workplace(options.work.resolve()) as work:
        results = rows(work, gb=options.gb, rounds=options.rounds)
    sys.stdout.write(f"{table(results)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
