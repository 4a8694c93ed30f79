"""A coverage as people and their tools read it: text, JSON, JUnit, GitHub."""

from __future__ import annotations

import json
from importlib import import_module

from dcpconv.plan.coverage import Coverage

KINDS = ("text", "json", "junit", "github")


def render(coverage: Coverage, kind: str) -> str:
    """What a file of one of ``KINDS`` holds; a GitHub log takes ``github.commands`` instead."""
    if kind == "json":
        return json.dumps(coverage.to_json(), indent=2) + "\n"
    # Imported one by one: a report in text should not wait for an XML library.
    rendered: str = import_module(f"dcpconv.checking.reports.{kind}").render(coverage)
    return rendered
