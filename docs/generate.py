"""Writes the generated pages of this folder anew; ``make docs`` runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from families_page import families_page

PAGES: Mapping[str, Callable[[], str]] = {
    "families.md": families_page,
}
"""File in this folder -> what it should hold."""


def main() -> None:
    """Writes every page."""
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
