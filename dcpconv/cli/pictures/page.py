"""The file itself: data, style and script in one page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<pre>{summary}</pre>
</header>
<main></main>
<noscript>The pictures are drawn by a script in this file.</noscript>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def page(title: str, summary: Sequence[str], sections: Sequence[dict[str, Any]]) -> str:
    """A whole page.

    Args:
        title: Its heading; may come from a file.
        summary: Lines below it.
        sections: What ``page.js`` draws: every one has a ``kind`` and a ``title``.
    """
    # Inside a script element nothing but "<" can end it or begin a comment.
    data = json.dumps(sections, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.format(
        title=html.escape(title),
        summary=html.escape("\n".join(summary)),
        data=data,
        style=(_HERE / "page.css").read_text(encoding="ascii"),
        script=(_HERE / "page.js").read_text(encoding="ascii"),
    )


def write(path: str, text: str) -> None:
    """Writes a page where the user wants it."""
    Path(path).write_text(text, encoding="utf-8")
