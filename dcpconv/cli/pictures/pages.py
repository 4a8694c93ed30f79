"""What is to be seen of a difference, a coverage and a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dcpconv.cli.pictures import grids, shards, treemaps
from dcpconv.cli.pictures.page import page
from dcpconv.core.catalog import Catalog
from dcpconv.core.printing import printable

if TYPE_CHECKING:
    from dcpconv.comparing.records import Diff
    from dcpconv.plan.coverage import Coverage
    from dcpconv.plan.sketches import Sketch

_LISTED = 100
"""Tensors in the list of what changed most; the grid has them all."""


def diff_page(diff: Diff) -> str:
    """The heat map of a difference, and what changed most."""
    from dcpconv.comparing.text import ends, verdict

    title = f"{diff.a.path} and {diff.b.path}"
    summary = [*ends(diff), *(f"note      {note}" for note in diff.notes), verdict(diff)]
    rows = []
    for tensor in diff.tensors[:_LISTED]:
        apart = tensor.apart
        if tensor.status in {"equal", "close"}:
            continue
        figures = ["", "", "", ""]
        if apart is not None:
            values = (apart.relative, apart.max_abs, apart.mean_abs, apart.cosine)
            figures = [f"{value:.6g}" for value in values]
        rows.append([printable(tensor.name), tensor.status.replace("_", " "), *figures])
    sections = [grids.of_diff(diff)]
    if rows:
        sections.append(
            {
                "kind": "list",
                "title": "What changed most",
                "columns": ["tensor", "", "relative", "max |a-b|", "mean |a-b|", "cosine"],
                "numbers": [2, 3, 4, 5],
                "rows": rows,
            }
        )
    return page(printable(title), [printable(line) for line in summary], sections)


def coverage_page(coverage: Coverage) -> str:
    """The matrix of a coverage, and every reason folded."""
    from dcpconv.checking.reports.text import lines

    text = [printable(line) for line in lines(coverage, pictured=False)]
    title = f"{coverage.read.path or coverage.source}: does it fit {_target(coverage)}?"
    return page(printable(title), text, [grids.of_coverage(coverage)])


def catalog_page(
    catalog: Catalog, summary: Sequence[str], sketches: Sequence[tuple[str, Sketch]]
) -> str:
    """What takes the room, which file holds what, and how some tensors are distributed."""
    sections = [treemaps.of_catalog(catalog)]
    sections += [_sketched(key, sketch) for key, sketch in sketches]
    sections += shards.of_catalog(catalog)
    return page(printable(str(catalog.source)), [printable(line) for line in summary], sections)


def _target(coverage: Coverage) -> str:
    return coverage.asked.path or coverage.target


def _sketched(key: str, sketch: Sketch) -> dict[str, Any]:
    step = (sketch.high - sketch.low) / max(1, len(sketch.counts))
    edges = [sketch.low + step * at for at in range(len(sketch.counts) + 1)]
    summary = (
        f"{sketch.numel:,} elements, mean {sketch.mean:.4g}, standard deviation {sketch.std:.4g},"
        f" from {sketch.low:.4g} to {sketch.high:.4g}, {sketch.zeros:,} zeros,"
        f" {sketch.odd:,} infinite or no number"
    )
    return {
        "kind": "bars",
        "title": f"Values of {printable(key)}",
        "hint": "Heights are square roots of counts, so that tails are seen.",
        "counts": list(sketch.counts),
        "labels": [f"{a:.4g} to {b:.4g}" for a, b in pairwise(edges)],
        "low": f"{sketch.low:.4g}",
        "high": f"{sketch.high:.4g}",
        "summary": summary,
    }
