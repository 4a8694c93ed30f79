"""The site has every page of the repository, and no link in it leads nowhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import dcpconv
from docs import site

ROOT = Path(__file__).parents[3]
GENERATED = {"docs/api.md"}


def listed(entry: Any) -> Iterator[str]:
    """Pages of a menu, whatever their titles."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for inner in entry.values():
            yield from listed(inner)
    else:
        for inner in entry:
            yield from listed(inner)


def test_every_page_is_in_the_menu_once() -> None:
    menu = list(listed(yaml.safe_load(site.CONFIG.read_text())["nav"]))
    pages = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")}
    pages |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/**/*.md")}
    pages |= {name for name in site.TOP if name.endswith(".md")}
    assert sorted(menu) == sorted(pages | GENERATED)


def test_the_python_page_names_all_that_is_exported() -> None:
    page = site.api_page()
    for name in dcpconv.__all__:
        assert f".{name}\n" in page


@pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None, reason="the extra docs is not installed"
)
def test_the_site_builds(tmp_path: Path) -> None:
    assert site.build(tmp_path / "site") == 0
    html = tmp_path / "site/html"
    assert "Converts a checkpoint" in (html / "docs/api/index.html").read_text()
    assert (html / "docs/rope/index.html").is_file()
