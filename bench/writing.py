"""The page and the plot: ``docs/benchmarks.md`` and ``docs/benchmarks.svg``."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import comparing, loading, start_up, two_ranks
from bench.cases import PEERS
from bench.comparing import Compared
from bench.loading import Loaded
from bench.measure import Result, table
from bench.scale import Growth
from bench.start_up import Start

PAGE = Path("docs/benchmarks.md")
PLOT = Path("docs/benchmarks.svg")


def write_page(
    sections: Mapping[str, Sequence[Result]],
    loaded: Sequence[Loaded],
    compared: Sequence[Compared],
    shared: Sequence[two_ranks.Ranks],
    growth: Sequence[Growth],
    started: Sequence[Start],
    notes: Sequence[str],
    *,
    gb: float,
    pairs: int,
    texts: Mapping[str, str],
) -> None:
    """Writes what was measured, with machine and date."""
    today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    kernel = platform.release().split("-")[0]
    lines = [
        "# Benchmarks",
        "",
        (
            f"Measured {today} with `make bench` on {os.cpu_count()} cores ({platform.machine()},"
            f" Linux {kernel}), Python {platform.python_version()}.  The model is"
            f" Llama-3.2-1B shaped, {gb} GB in bf16.  Every row is a whole process, interpreter"
            " start and final sync included; `floor` is `cp` of the same bytes and `fsync` of the"
            f" copy, run in turns with the case; medians over {pairs} pairs, and the extremes of"
            " the ratio.  The machine is shared and noisy: read the ratios, not the seconds."
        ),
        "",
        "![wall time against the floor](benchmarks.svg)",
        "",
    ]
    for title, results in sections.items():
        lines += [f"## {title}", "", "```", table(results), "```", ""]
    lines += _against_peers(sections.get("ordinary disk", ()))
    if loaded:
        lines += [
            "## Two ranks load into a sharded model",
            "",
            "```",
            loading.table(loaded),
            "```",
            "",
        ]
    if compared:
        lines += [
            "## Fingerprints and differences",
            "",
            (
                "Beside `cat FILES > /dev/null` of the same files, all in the page cache; the ratio"
                " is of speeds, best of five.  Only measuring what changed needs torch, which"
                " takes 220 MiB by itself."
            ),
            "",
            "```",
            comparing.table(compared),
            "```",
            "",
        ]
    for title, text in texts.items():
        lines += [f"## {title}", "", "```", text, "```", ""]
    if shared:
        lines += ["## Two ranks beside one", "", "```", two_ranks.table(shared), "```", ""]
    if growth:
        lines += ["## 100 to 100,000 tensors", "", "```", *map(str, growth), "```", ""]
    lines += ["## Start-up", "", "```", start_up.table(started), "```", ""]
    lines += [f"* {note}" for note in notes]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    _plot(sections)


def _against_peers(results: Sequence[Result]) -> list[str]:
    by_name = {row.name: row for row in results}
    lines = []
    for peer in PEERS:
        if peer.against is None or peer.name not in by_name or peer.against[0] not in by_name:
            continue
        ours, theirs = by_name[peer.against[0]], by_name[peer.name]
        memory = theirs.peak / ours.peak if ours.peak else 0.0
        lines.append(
            f"| {peer.against[0]} | {peer.name} | {ours.seconds / theirs.seconds:.2f} |"
            f" {peer.against[1]:.1f} | 1/{memory:.0f} |"
        )
    if not lines:
        return []
    head = [
        "## against what people use today",
        "",
        "| ours | theirs | our wall / their wall | target | memory |",
    ]
    return [*head, "| --- | --- | --- | --- | --- |", *lines, ""]


def _plot(sections: Mapping[str, Sequence[Result]]) -> None:
    import matplotlib as mpl  # noqa: PLC0415  only where a page is written

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "dcpconv"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = [(f"{title}: {row.name}", row) for title, results in sections.items() for row in results]
    rows.reverse()
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    peers = {peer.name for peer in PEERS}
    colours = ["#b0b0b0" if row.name in peers else "#2a6f97" for _, row in rows]
    axes.barh([name for name, _ in rows], [row.ratio for _, row in rows], color=colours)
    for at, (_, row) in enumerate(rows):
        axes.text(row.ratio, at, f" {row.ratio:.2f}", va="center", fontsize=8)
        if row.target is not None:
            axes.plot([row.target] * 2, [at - 0.4, at + 0.4], color="#d62828", linewidth=1.5)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("wall time / (cp + fsync) of the same bytes; red: target; grey: others")
    axes.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
