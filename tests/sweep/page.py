"""The table of what holds for every architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sweep import STEPS

PAGE = Path("docs/architectures.md")

Results = Mapping[str, Mapping[str, str]]


def summary(results: Results) -> str:
    """How many of each step, and everything that is not as it should be."""
    built = {name: one for name, one in results.items() if "parameters" in one}
    skipped = {name: one["skipped"] for name, one in results.items() if "skipped" in one}
    lines = [f"{len(results)} architectures, {len(built)} built, {len(skipped)} skipped"]
    for step in STEPS:
        good = sum(one.get(step, "").startswith("ok") for one in built.values())
        passed = sum(one.get(step, "").startswith("skipped") for one in built.values())
        lines.append(f"{step:10} {good:4} ok {passed:4} skipped {len(built) - good - passed:4} not")
    for name, one in results.items():
        if "crashed" in one:
            lines.append(f"{name}: crashed: {one['crashed']}")
        for step in STEPS:
            said = one.get(step, "ok")
            if not said.startswith(("ok", "skipped")):
                lines.append(f"{name}: {step}: {said}")
    return "\n".join(lines)


def write_page(results: Results, page: Path = PAGE) -> None:
    """Writes the table."""
    page.write_text(summary(results))
