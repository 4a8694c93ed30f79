"""The pages are true: their transcripts are run, their commands, options and files exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.cli_page import cli_page, commands
from support.machine.transcripts import BLOCK, normalised, prepare, run_page

ROOT = Path(__file__).parents[3]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
    *sorted((ROOT / "examples").glob("**/*.md")),
]
RUN_ELSEWHERE = {
    "keymaps.md": "tests/unit/families/test_keymaps.py",
    "remote.md": "tests/unit/stores/test_remote_page.py",
}
"""A page whose transcript needs a checkpoint of its own, and the test that runs it."""

WITH_TRANSCRIPTS = [
    page for page in PAGES if BLOCK.search(page.read_text()) and page.name not in RUN_ELSEWHERE
]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(dcpconv [a-z]+(?: .*)?)$", re.MULTILINE)


def _named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_some_pages_have_transcripts() -> None:
    assert {_named(page) for page in WITH_TRANSCRIPTS} >= {
        *("README.md", "docs/check.md", "docs/runs.md", "docs/training-state.md")
    }


@pytest.mark.parametrize("page", WITH_TRANSCRIPTS, ids=_named)
def test_transcripts_are_what_the_commands_print(page: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    blocks = list(run_page(page.read_text(), tmp_path))
    assert blocks
    for expected, found in blocks:
        assert normalised(found) == normalised(expected)


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_every_transcript_is_marked_as_one(page: Path) -> None:
    rest = BLOCK.sub("", page.read_text())
    assert not re.search(r"^\$ ", rest, re.MULTILINE), "fence it with ```console"


@pytest.mark.parametrize(("page", "test"), RUN_ELSEWHERE.items())
def test_a_page_that_is_run_elsewhere_is_read_there(page: str, test: str) -> None:
    assert f'"{page}"' in (ROOT / test).read_text()


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text())
    }
    pages = set((ROOT / "docs").glob("*.md"))
    assert not {_named(page) for page in pages - linked}


def _commands(page: Path) -> Iterator[str]:
    for fence in FENCE.findall(page.read_text()):
        yield from COMMAND.findall(fence)


@pytest.mark.parametrize("page", [p for p in PAGES if any(_commands(p))], ids=_named)
def test_the_commands_of_a_page_and_their_options_exist(page: Path) -> None:
    known = dict(commands())
    for line in _commands(page):
        words = re.split(r" #|[;|>]", line)[0].split()
        name = next((name for name in known if words[: len(name.split())] == name.split()), None)
        assert name, line
        options = {option for parameter in known[name].params for option in parameter.opts}
        used = {word.strip("[],").partition("=")[0] for word in words if word.startswith("-")}
        assert used <= options, line


def test_every_command_and_option_is_documented() -> None:
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert page == cli_page(), "run `make docs`"
    for name, command in commands():
        assert f"\n## {name}\n" in page
        chapter = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)
            assert all(option in chapter for option in parameter.opts if option[0] == "-")
