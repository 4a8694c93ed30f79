"""Starts one fresh interpreter per rank; ranks meet at a file, so no port can be taken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_PATIENCE_S = 800
"""No rank is given up before: on a slow machine with many tests at once, starting takes minutes."""

_TESTS = Path(__file__).parents[2]
_PATH = (_TESTS, _TESTS.parent / "examples", _TESTS.parent)


def run_ranks(
    script: str,
    ranks: int,
    directory: Path,
    *,
    timeout_s: float,
    said: Mapping[str, str] | None = None,
) -> None:
    """Run ``script RANK RANKS DIRECTORY`` once per rank, to its end; ``said`` to its environment.

    Raises:
        AssertionError: A rank failed or did not end; shows what it printed.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(map(str, _PATH)),
        **(said or {}),
    }
    logs = [directory / f"rank{rank}-of-{ranks}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-W", "ignore", script, str(rank), str(ranks), str(directory)]
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            )
    try:
        codes = [process.wait(max(timeout_s, _PATIENCE_S)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
