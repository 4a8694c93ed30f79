"""What is in a file reaches no terminal as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dcpconv.checking.reports import KINDS
from dcpconv.cli.app import app
from dcpconv.core.errors import FormatError
from support.checkpoints.check_cases import llama_shapes, write_hf

NASTY = ["\x1b]0;title\x07", "\x9b2J", "a\rb", "a\nb", "\u202egnp", "\u2028", "x\x7f\x08"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shapes = llama_shapes() | {f"model.layers.0.{text}.weight": (3,) for text in NASTY}
    return write_hf(tmp_path / "source", shapes)


def is_calm(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


COMMANDS = [
    *(["check", "{}", "--report", kind] for kind in KINDS),
    ["check", "{}", "--to", "lingua"],
    ["inspect", "{}"],
    ["inspect", "{}", "--json"],
    ["keys", "{}"],
    ["convert", "{}", "{}.out", "--to", "lingua"],
    ["convert", "{}", "{}.out", "--form", "dcp", "--dry-run"],
    ["convert", "{}", "{}.out", "--only", "\x1b[2J"],
    ["inspect", "{}/\x1b[2J"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_control_characters_are_escaped(command: list[str], source: Path) -> None:
    found = CliRunner().invoke(app, [word.format(source) for word in command])
    assert found.exit_code in {0, 1, 2}
    assert is_calm(found.output), ascii(found.output)
    assert found.output


def test_json_means_the_same_as_before(source: Path) -> None:
    found = CliRunner().invoke(app, ["inspect", str(source), "--json"])
    keys = json.loads(found.stdout)["tensors"]
    assert {f"model.layers.0.{text}.weight" for text in NASTY} <= keys.keys()


def test_an_error_is_one_fact_per_line() -> None:
    error = FormatError("a\x1bb", [("key", "one\ntwo"), ("half", "\ud800")], hint="c\u202ed")
    assert str(error).split("\n") == [
        "a\\x1bb",
        "  key       one\\ntwo",
        "  half      \\ud800",
        "  hint      c\\u202ed",
    ]
