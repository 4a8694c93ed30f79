"""docs/guarantees.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE)))


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_exists(name: str) -> None:
    assert "def test_" in (ROOT / name).read_text(encoding="utf-8")


def test_every_promise_names_its_tests() -> None:
    chapters = PAGE.split("\n## ")[1:]
    assert len(chapters) == 6
    for chapter in chapters:
        assert re.search(r"Shown by `tests/", chapter), chapter.splitlines()[0]
    mine = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/hostile").glob("test_*.py")
    }
    assert mine - set(NAMED) <= {"tests/hostile/test_runs.py"}
