"""``python -m sweep``: the table of ``docs/architectures.md``.

Architectures run in batches, each in a process of its own: one that crashes or hangs costs its own
result and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sweep import STEPS
from sweep.page import PAGE, page, summary

PATIENCE = 180
"""Seconds for one architecture."""

ROOM = 8 << 30
"""Bytes that a process may take: a config that shrinks badly fails instead of the machine."""


def main() -> int:
    """Runs, prints a summary, and with ``--write`` keeps the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="model types, after commas; all by default")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--batch", type=int, default=12, help="architectures per process")
    parser.add_argument("--steps", default=",".join(STEPS), help="steps, after commas")
    parser.add_argument("--results", type=Path, default=Path("out/sweep.json"))
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    parser.add_argument("--resume", action="store_true", help="keep what --results has already")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.worker.split(","), options.steps.split(","))
    every = _all()
    found: dict[str, Any] = {}
    if options.resume and options.results.is_file():
        found = json.loads(options.results.read_text())
    names = options.only.split(",") if options.only else every
    names = [name for name in names if name not in found]
    batches = [names[at : at + options.batch] for at in range(0, len(names), options.batch)]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for some in pool.map(lambda batch: _batch(batch, options.steps), batches):
            found |= some
            options.results.write_text(json.dumps(found, indent=1) + "\n")
            sys.stderr.write(f"{len(found)} of {len(every)}\n")
    sys.stdout.write(f"{summary(found)}\n")
    if options.write and not options.only:
        PAGE.write_text(page(found, version("transformers"), every))
    return 0


def _all() -> list[str]:
    from sweep.building import architectures

    return [one.model_type for one in architectures()]


def _batch(names: list[str], steps: str) -> dict[str, Any]:
    """Results of some architectures; the rest of a batch goes on after a crash."""
    found: dict[str, Any] = {}
    while names:
        run = subprocess.run(
            [sys.executable, "-m", "sweep", "--worker", ",".join(names), "--steps", steps],
            check=False,
            capture_output=True,
            text=True,
        )
        for line in run.stdout.splitlines():
            if line.startswith("{"):
                found |= json.loads(line)
        names = [name for name in names if name not in found]
        if names:
            last = run.stderr.strip().splitlines()[-1:]
            found[names[0]] = {"crashed": f"exit {run.returncode}: {' '.join(last)[:200]}"}
            names = names[1:]
    return found


def _work(names: list[str], steps: list[str]) -> int:
    import warnings

    import torch
    from transformers.utils import logging

    from sweep.building import CannotBuildError, architectures
    from sweep.steps import prove

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))
    signal.signal(signal.SIGALRM, _give_up)
    known = {one.model_type: one for one in architectures()}
    for name in names:
        one = known[name]
        result: dict[str, str] = {"class": one.model, "kind": one.kind}
        work = Path(tempfile.mkdtemp(prefix="sweep-"))
        signal.alarm(PATIENCE)
        try:
            result |= prove(one, work, steps)
        except CannotBuildError as error:
            result["skipped"] = str(error)
        except TimeoutError:
            result["crashed"] = f"no answer within {PATIENCE} s"
        except Exception as error:  # noqa: BLE001 - transformers' own trouble with a tiny model
            result["skipped"] = f"transformers: {type(error).__name__}: {str(error)[:160]}"
        finally:
            signal.alarm(0)
            shutil.rmtree(work, ignore_errors=True)
        sys.stdout.write(json.dumps({name: result}) + "\n")
        sys.stdout.flush()
    return 0


def _give_up(*_unused: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    sys.exit(main())
