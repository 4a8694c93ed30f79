"""Process groups on one machine that play scenes, and what each rank made of each scene.

``launch`` starts one fresh interpreter per rank, which runs a script that calls ``take_part``;
ranks meet at a file, so no port can be taken.  One world plays many scenes, because starting torch
costs more than most of them.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from support.worlds.ranks import run_ranks

TIMEOUT_S = 180
"""How long a rank waits for another: a scene that hangs is an error long before the test ends."""

Scene = Callable[[Path], Any]
"""Gets the world's directory; what it returns must be JSON."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a scene ended on one rank.

    Attributes:
        value: What it returned.
        error: Class of what it raised, or empty.
        text: Its message.
    """

    value: Any = None
    error: str = ""
    text: str = ""


def launch(
    script: str, ranks: int, directory: Path, *, timeout_s: float = 120, device: str = ""
) -> list[dict[str, Outcome]]:
    """Run ``script`` once per rank; returns the outcomes of every rank, by scene.

    ``device`` is where ``sharded_models`` has its models; by default where the tests say.

    Raises:
        AssertionError: A rank failed or did not end; shows what it printed.
    """
    said = {"DCPCONV_TEST_DEVICE": device} if device else {}
    run_ranks(script, ranks, directory, timeout_s=timeout_s, said=said)
    texts = [(directory / f"rank{rank}-of-{ranks}.json").read_text() for rank in range(ranks)]
    return [{name: Outcome(**found) for name, found in json.loads(text).items()} for text in texts]


def take_part(scenes: Mapping[int, Mapping[str, Scene]], *, backend: str = "gloo") -> None:
    """Be the rank that the command line says, in all scenes for a world of that size."""
    import torch
    import torch.distributed as dist

    rank, ranks, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{directory}/rendezvous-of-{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    outcomes: dict[str, Outcome] = {}
    for name, scene in scenes[ranks].items():
        dist.barrier()
        try:
            outcome = Outcome(scene(directory))
        except BaseException as error:  # noqa: BLE001 - DCP raises BaseException
            outcome = Outcome(None, type(error).__name__, str(error))
        outcomes[name] = outcome
        sys.stderr.write(f"{name}: {outcome.error or 'done'} {outcome.text}\n")  # if it hangs later
    (directory / f"rank{rank}-of-{ranks}.json").write_text(
        json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()})
    )
    dist.destroy_process_group()
