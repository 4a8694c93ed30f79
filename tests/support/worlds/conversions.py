"""Ranks of one conversion: as threads of this process, or as processes that share a directory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from dcpconv import convert
from dcpconv.conversion.report import ConversionReport
from support.checkpoints.check_cases import llama_shapes, write_hf

SMALL: Mapping[str, float] = {
    "dcpconv.engine.cutting.SMALLEST": 4096,
    "dcpconv.engine.cutting.STEP": 16384,
    "dcpconv.engine.worlds.watching.BEAT": 0.05,
    "dcpconv.engine.worlds.watching.FAREWELL": 2.0,
    "dcpconv.engine.worlds.watching.LOST_AFTER": 30.0,
    "dcpconv.engine.worlds.watching.PATIENCE": 120.0,
}
"""Shares and waits for results of a few hundred kilobytes."""

RANK = """
import sys
{patches}
sys.argv = ["dcpconv", *sys.argv[1:]]
from dcpconv.cli.app import app
app()
"""
"""The command line, with other constants."""


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small results into many pieces, and wait for nobody long."""
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)


def random_hf(directory: Path) -> Path:
    """A checkpoint of two files that hold any bytes behind their headers."""
    made = write_hf(directory / "source", llama_shapes(), files=2)
    for file in made.glob("*.safetensors"):
        state = file.stat()
        with file.open("r+b") as opened:
            opened.seek(4000)
            opened.write(os.urandom(state.st_size - 4000))
    return made


def in_threads(
    source: Path, target: Path, ranks: int, **options: Any
) -> list[ConversionReport | BaseException]:
    """What every rank returns or raises; ``each`` gives options of single ranks."""
    each: Mapping[int, dict[str, Any]] = options.pop("each", {})
    found: dict[int, ConversionReport | BaseException] = {}

    def run(rank: int) -> None:
        own = {"source": source, "rank": rank, "of": ranks, **options, **each.get(rank, {})}
        try:
            found[rank] = convert(target=target, **own)
        except BaseException as error:  # noqa: BLE001 - returned to the test
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(ranks)]


def script(patches: Mapping[str, object] = SMALL, *, before: str = "") -> str:
    """A program that is the command line with other constants.

    Args:
        patches: Values by dotted name.
        before: Statements to run first.
    """
    lines = []
    for name, value in patches.items():
        module, _, attribute = name.rpartition(".")
        lines.append(f"import {module}\n{module}.{attribute} = {value!r}")
    return RANK.format(patches="\n".join([*lines, before]))


def environment() -> dict[str, str]:
    """As in a shell, with this package."""
    return {
        **{name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }


def start(
    program: str, *arguments: str | Path, given: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """One rank as a process of its own; ``given`` is what its environment has beside."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **(given or {})},
    )


def torchrun(count: int, directory: Path, program: str, *arguments: str | Path) -> Any:
    """What a real torchrun makes of so many ranks."""
    file = directory / "rank.py"
    file.write_text(program)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(count), str(file), *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )


@contextmanager
def agent(ranks: int) -> Iterator[list[dict[str, str]]]:
    """What torchrun gives its workers, without the part of it that ends all where one ends."""
    store = distributed.TCPStore(  # type: ignore[attr-defined]  # as torch documents it
        "127.0.0.1", 0, ranks + 1, is_master=True, wait_for_workers=False
    )
    yield [
        {
            "TORCHELASTIC_RUN_ID": "tests",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
        }
        for rank in range(ranks)
    ]


def rank_of(
    source: Path, target: Path, program: str, rank: int, of: int, *options: str
) -> subprocess.Popen[str]:
    """One rank of a job array, which writes a DCP."""
    return start(
        program,
        *("convert", source, target, "--form", "dcp", "--json"),
        *("--rank", str(rank), "--of", str(of), *options),
    )


def ranks(
    source: Path, target: Path, programs: Iterable[str], *options: str
) -> list[subprocess.Popen[str]]:
    """One process per program; the last one is rank 0, which so comes last."""
    listed = list(programs)
    started = {
        rank: rank_of(source, target, listed[rank], rank, len(listed), *options)
        for rank in reversed(range(len(listed)))
    }
    return [started[rank] for rank in range(len(listed))]


def ends(processes: Iterable[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        found.append((process.returncode, out, err))
    return found


def until(what: Callable[[], object]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def staged(target: Path) -> Path:
    """The staging directory."""
    return target.parent / f".{target.name}.dcpconv-staging"


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a result with its bytes."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
