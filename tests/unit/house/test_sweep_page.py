"""The page that the sweep writes: nothing that does not hold is left out."""

from __future__ import annotations

from sweep import STEPS
from sweep.page import HEADINGS, page, summary

RESULTS = {
    "good": {"class": "Good", "parameters": "5", "live": "ok, outputs", "base": "skipped: none"},
    "bad": {"class": "Bad", "parameters": "6", "live": "wrong: 1 <tensor> | differs"},
    "odd": {"class": "Odd", "skipped": "needs timm"},
    "dead": {"class": "Dead", "crashed": "exit -9"},
}


def test_every_step_has_a_heading() -> None:
    assert tuple(HEADINGS) == STEPS


def test_the_page_counts_what_it_lists() -> None:
    lines = page(RESULTS, "5.23.0").splitlines()
    assert "transformers 5.23.0: 4 architectures, 2 of them built" in lines[2]
    assert any(line.startswith("| live |") and line.endswith("| 1 | 0 | 1 |") for line in lines)
    assert any(line.startswith("| base |") and line.endswith("| 0 | 1 | 0 |") for line in lines)
    assert "- bad, live: wrong: 1 (tensor) / differs" in lines
    assert lines[-2:] == ["- odd: needs timm", "- dead: exit -9"]


def test_the_summary_names_what_does_not_hold() -> None:
    text = summary(RESULTS)
    assert "4 architectures, 2 built, 1 skipped" in text
    assert "bad: live: wrong" in text
    assert "dead: crashed: exit -9" in text
    assert "good:" not in text
