"""Worlds of a few ranks on this machine, each rank a fresh process of one of our modules."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


def run_world(module: str, case: str, *, ranks: int, places: Mapping[str, Path]) -> list[Any]:
    """What each rank of ``python -m MODULE --case CASE --rank RANK`` printed as JSON at last.

    Args:
        module: A module whose ``main`` takes the options of ``add_rank_options``.
        case: What the ranks do.
        ranks: How many.
        places: Further options that name a path.

    Raises:
        RuntimeError: A rank failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-m", module, "--case", case]
    for name, path in places.items():
        command += [f"--{name}", str(path)]
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            subprocess.Popen(  # noqa: S603  our own interpreter
                [*command, "--meeting", meeting, "--rank", str(rank)],
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for rank in range(ranks)
        ]
        told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{case}: a rank failed")
    return [json.loads(text.splitlines()[-1]) for text in told]


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Hidden options by which ``run_world`` starts a rank."""
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    parser.add_argument("--hf", type=Path, help=argparse.SUPPRESS)


def join(options: argparse.Namespace, *, ranks: int) -> None:
    """Makes this process a rank of a gloo world."""
    import torch.distributed as dist  # noqa: PLC0415 - only ranks need it

    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.meeting}/rendezvous",
        rank=options.rank,
        world_size=ranks,
    )


def leave(found: Mapping[str, float]) -> NoReturn:
    """Prints what a rank found and ends it at once.

    gloo's thread frees what a collective gave out, and needs the interpreter for it; where a
    barrier ends a short program, the interpreter may be gone by then, and the process is aborted.

    Source: torch 2.13 ``ProcessGroupGloo::runLoop`` (``AsyncBarrierWork`` keeps earlier work).
    """
    import torch.distributed as dist  # noqa: PLC0415

    dist.destroy_process_group()
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
