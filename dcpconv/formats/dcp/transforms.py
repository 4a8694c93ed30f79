"""Items that went through a stream transform on their way to disk: compression, encryption."""

from __future__ import annotations

import importlib.util


def transform_hint(names: str) -> str | None:
    """How to read transformed items: torch itself undoes what its own extension did.

    Source: torch 2.13 ``distributed/checkpoint/_extension.py``, ``ZStandard``.
    """
    if not names.startswith("stream.zstd/"):
        return "only the code that wrote them can read them; load and save it with that"
    command = "dcpconv convert SRC DST --engine torch"
    if not any(map(importlib.util.find_spec, ("zstandard", "pyzstd"))):
        return f"pip install zstandard, then {command}"
    return f"torch reads them: {command}"
