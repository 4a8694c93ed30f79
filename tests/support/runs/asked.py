"""Everything that is asked about a run, to be asked of any run at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from dcpconv import find_checkpoints, find_latest_checkpoint, resolve_checkpoint
from dcpconv.core.errors import DcpconvError
from dcpconv.runs import Best, Retention, prune, strip, verify_checkpoints

BEST = Best("eval_loss", "min")
ASKED: dict[str, Callable[[Path], object]] = {
    "list": find_checkpoints,
    "latest": lambda run: find_latest_checkpoint(run, verify=True),
    "resolve": lambda run: resolve_checkpoint("latest", run),
    "best": lambda run: resolve_checkpoint("best:eval_loss:min", run, verify=True),
    "number": lambda run: resolve_checkpoint(2, run, verify=True),
    "verify": lambda run: list(verify_checkpoints(run)),
    "prune": lambda run: prune(run, Retention(keep_last=1)),
    "prune best": lambda run: prune(run, Retention(keep_best=(BEST,))),
    "strip": strip,
}
"""Everything that is asked about a run, by name."""


def only_our_errors(run: Path) -> None:
    """The last resort: whatever the input, the answer is a result or an error of ours."""
    for ask in ASKED.values():
        with contextlib.suppress(DcpconvError):
            ask(run)
