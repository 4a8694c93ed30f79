"""What is left in a staging directory beside a target that is there."""

from __future__ import annotations

from pathlib import Path

from dcpconv.engine.publish import OWNER, RESULT, SHARES
from dcpconv.engine.worlds import watching
from dcpconv.engine.worlds.meeting import read_beat


def is_over(root: Path) -> bool:
    """Whether nothing in a staging directory is of use: no run goes on with what was written, and
    no rank is alive.

    Args:
        root: The directory, which this process has locked just now.
    """
    result, shares = root / RESULT, root / SHARES
    goes_on = (shares / "plan").exists() and result.is_dir() and any(result.iterdir())
    # By the clock of the file system: the lock is as new as a sign of life can be.
    now = (root / OWNER).stat().st_mtime
    return not goes_on and not any(_may_live(file, now) for file in shares.glob("rank-*"))


def _may_live(file: Path, now: float) -> bool:
    """Whether the process may be alive that writes this sign of life."""
    beat = read_beat(file.parent, int(file.name.removeprefix("rank-")))
    if beat is None or beat.state in {"failed", "left"}:
        return False
    return not beat.is_gone and (beat.is_here or now - file.stat().st_mtime < watching.LOST_AFTER)
