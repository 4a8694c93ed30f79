"""A coverage as people and their tools read it: text, JSON, JUnit, GitHub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from dcpconv.coverage import Coverage
from dcpconv.reports import github, junit, text

__all__ = ["KINDS", "github", "junit", "text"]


def _json(coverage: Coverage) -> str:
    return json.dumps(coverage.to_json(), indent=2) + "\n"


KINDS: Mapping[str, Callable[[Coverage], str]] = {
    "text": text.render,
    "json": _json,
    "junit": junit.render,
    "github": github.summary,
}
"""What a file of each kind holds.  (A GitHub log takes ``github.commands``.)"""
