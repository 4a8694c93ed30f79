"""The pages are true: their transcripts are run, their files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.machine.transcripts import normalised, prepare, run_page

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", ["README.md", "docs/adapters.md", "docs/runs.md"])
def test_transcripts_are_what_the_commands_print(page: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    blocks = list(run_page((ROOT / page).read_text(), tmp_path))
    assert blocks
    for expected, found in blocks:
        assert normalised(found) == normalised(expected)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
