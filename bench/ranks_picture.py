"""A picture of ``bench.ranks``: the critical path, and what each rank's planning took."""

from __future__ import annotations

from typing import Any

WIDTH, ROW, LEFT, RIGHT = 720, 22, 130, 150
COLOURS = {
    "open": "#4c78a8",
    "tell": "#72b7b2",
    "plan": "#f58518",
    "read": "#54a24b",
    "send": "#b279a2",
}
WORDS = {
    "open": "rank 0 opens the headers",
    "tell": "the catalog reaches all ranks",
    "plan": "every rank plans (measured)",
    "read": "storage delivers every byte once",
    "send": "tiles reach the replicas, meanwhile",
}


def picture(found: dict[str, Any]) -> str:
    """An SVG of a result of ``bench.ranks``."""
    path: dict[str, float] = found["critical_path"]
    scale = found["scale"]
    starts: dict[str, float] = {}
    at = 0.0
    for step, seconds in path.items():
        starts[step] = starts["read"] if step == "send" else at
        at += seconds if step != "send" else 0.0
    total = max(starts[step] + path[step] for step in path)
    room = WIDTH - LEFT - RIGHT
    title = f"{scale['ranks']} ranks, {found['checkpoint']['tensors']:,} tensors: {total:.1f} s"
    rows = [f'<text x="10" y="20" font-weight="bold">{title}</text>']
    for number, (step, seconds) in enumerate(path.items()):
        top = 34 + number * ROW
        left = LEFT + room * starts[step] / total
        width = max(1.0, room * seconds / total)
        rows += [
            f'<text x="10" y="{top + 14}">{step}</text>',
            _bar(left, top, width, COLOURS[step], WORDS[step]),
            f'<text x="{left + width + 5:.1f}" y="{top + 14}">{seconds:.2f} s</text>',
        ]
    top = 34 + len(path) * ROW + 24
    rows.append(f'<text x="10" y="{top}" font-weight="bold">planning, rank by rank</text>')
    most = max(one["peak"] for one in found["ranks"])
    for number, one in enumerate(found["ranks"]):
        line = top + 8 + number * ROW
        width = max(1.0, room * one["peak"] / most)
        took = f"{one['peak']:.0f} MiB, {one['seconds']:.1f} s"
        rows += [
            f'<text x="10" y="{line + 14}">rank {one["rank"]}</text>',
            _bar(LEFT, line, width, "#bbb", "memory that planning adds"),
            f'<text x="{LEFT + width + 5:.1f}" y="{line + 14}">{took}</text>',
        ]
    height = top + 8 + len(found["ranks"]) * ROW + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="12">\n' + "\n".join(rows) + "\n</svg>\n"
    )


def _bar(left: float, top: float, width: float, colour: str, words: str) -> str:
    place = f'x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 5}"'
    return f'<rect {place} fill="{colour}"><title>{words}</title></rect>'
