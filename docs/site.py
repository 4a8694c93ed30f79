"""Builds the site from the repository's own Markdown, strictly: ``make site`` runs it.

Pages keep their places beside each other, so that a link works in a checkout and in the site.
zensical builds it: it is the maintained successor of mkdocs-material, reads the same file, checks
links and anchors, and takes docstrings through mkdocstrings.  That every page is in a menu, which
it does not check, is a test (``tests/unit/house/test_site.py``).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import dcpconv

ROOT = Path(__file__).parents[1]
SITE = ROOT / "out/site"
CONFIG = ROOT / "docs/mkdocs.yml"

TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "action.yml")
FOLDERS = ("docs", "examples")
_LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "*_page.py", "*_picture.py", "generate.py", "site.py", "*.yml"
)

_API = """# Python

Everything that `dcpconv` exports. What a function raises is a `DcpconvError` with a headline, facts
and a hint; nothing here imports torch before it is needed.

"""


def api_page() -> str:
    """A page that asks mkdocstrings for everything that the package exports."""
    homes = dcpconv._HOMES  # noqa: SLF001 - the table of contents of the package
    return _API + "\n".join(f"::: {home}.{name}\n" for name, home in sorted(homes.items()))


def lay_out(site: Path) -> None:
    """Every page where its links expect it."""
    pages = site / "pages"
    shutil.rmtree(site, ignore_errors=True)
    pages.mkdir(parents=True)
    shutil.copy(CONFIG, site)
    for name in TOP:
        shutil.copy(ROOT / name, pages / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, pages / name, ignore=_LEFT_OUT)
    (pages / "docs/api.md").write_text(api_page())


def build(site: Path = SITE) -> int:
    """Lays the pages out and builds them; a link that leads nowhere is an error.

    Returns:
        The exit status of zensical.
    """
    lay_out(site)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=site, check=False).returncode  # noqa: S603 - our own


if __name__ == "__main__":
    raise SystemExit(build())
