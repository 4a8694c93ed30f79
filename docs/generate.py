"""Writes the generated pages, and the index of the tables, anew; ``make docs`` runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cli_page import cli_page
from families_page import families_page
from rope_picture import rope_picture

from dcpconv.families.keymaps.index import TABLE_INDEX, index_text

HERE = Path(__file__).parent

PAGES: Mapping[Path, Callable[[], str]] = {
    HERE / "families.md": families_page,
    HERE / "cli.md": cli_page,
    HERE / "rope.svg": rope_picture,
    TABLE_INDEX: index_text,
}
"""File -> what it should hold."""


def main() -> None:
    """Writes every page."""
    for file, page in PAGES.items():
        file.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
