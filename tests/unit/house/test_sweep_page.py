"""The page that the sweep writes: nothing that does not hold is left out."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from sweep import STEPS
from sweep.building import architectures
from sweep.page import HEADINGS, PAGE, page, summary

RESULTS = {
    "good": {"class": "Good", "parameters": "5", "live": "ok, outputs", "base": "skipped: none"},
    "bad": {"class": "Bad", "parameters": "6", "live": "wrong: 1 <tensor> | differs"},
    "odd": {"class": "Odd", "skipped": "needs timm"},
    "dead": {"class": "Dead", "crashed": "exit -9"},
}


def test_every_step_has_a_heading() -> None:
    assert tuple(HEADINGS) == STEPS


def test_the_page_counts_what_it_lists() -> None:
    lines = page(RESULTS, "5.23.0", list(RESULTS)).splitlines()
    assert "transformers 5.23.0: 4 architectures, 2 of them built" in lines[2]
    assert any(line.startswith("| live |") and line.endswith("| 1 | 0 | 1 |") for line in lines)
    assert any(line.startswith("| base |") and line.endswith("| 0 | 1 | 0 |") for line in lines)
    assert "- bad, live: wrong: 1 (tensor) / differs" in lines
    assert lines[-2:] == ["- odd: needs timm", "- dead: exit -9"]


def test_the_page_names_what_has_not_run() -> None:
    lines = page(RESULTS, "5.23.0", [*RESULTS, "late", "later"]).splitlines()
    assert lines[2].endswith(
        "6 architectures, 2 of them built tiny with random weights, 1 not, 2 have not run."
    )
    assert lines[-3:] == ["## Has not run", "", "late, later"]


def test_the_page_is_of_the_transformers_that_is_installed() -> None:
    names = {one.model_type for one in architectures()}
    lines = (Path(__file__).parents[3] / PAGE).read_text().splitlines()
    installed = version("transformers")
    assert f"with transformers {installed}: {len(names)} architectures" in lines[2], (
        "run `make sweep`"
    )
    built = re.search(r"(\d+) of them built", lines[2])
    assert built is not None
    start = lines.index("| model_type | class | " + " | ".join((*STEPS[:-1], "namings")) + " |")
    rows = [line.split(" | ")[0].lstrip("| ") for line in lines[start + 2 :] if line[:2] == "| "]
    assert len(rows) == int(built[1])
    assert set(rows) <= names


def test_the_summary_names_what_does_not_hold() -> None:
    text = summary(RESULTS)
    assert "4 architectures, 2 built, 1 skipped" in text
    assert "bad: live: wrong" in text
    assert "dead: crashed: exit -9" in text
    assert "good:" not in text
