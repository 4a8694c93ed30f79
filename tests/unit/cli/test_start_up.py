"""What a command imports and reads before it does anything: modules are counted, not seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dcpconv.cli.app import COMMANDS, app
from support.models.hf_models import save_hf, tiny

HEAVY = ("torch", "numpy", "pydantic", "rich", "huggingface_hub", "importlib.metadata", "tomllib")

SCRIPT = """\
import json, sys
from dcpconv.cli.app import app
try:
    app({words!r}, standalone_mode=False)
finally:
    index = sys.modules.get("dcpconv.families.keymaps.index")
    read = sorted(index.tables().read) if index else []
    sys.stderr.write(json.dumps([sorted(sys.modules), read]))
"""


def after(*words: str) -> tuple[set[str], list[str]]:
    """Modules that a command leaves behind, and the tables it has read."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(words=list(words))],
        capture_output=True,
        text=True,
        check=True,
    )
    modules, tables = json.loads(done.stderr[done.stderr.rindex("[[") :])
    return set(modules), tables


def test_help_imports_no_command_and_reads_no_table() -> None:
    modules, tables = after("--help")

    assert not modules & {*HEAVY, "typer.rich_utils"}
    assert {name for name in modules if name.startswith("dcpconv")} == {
        *("dcpconv", "dcpconv.cli", "dcpconv.cli.app", "dcpconv.cli.coercion")
    }
    assert not tables


@pytest.mark.parametrize("to", ["hf", "lingua"])
def test_a_small_conversion_imports_what_it_needs(tmp_path: Path, to: str) -> None:
    save_hf(tiny("llama"), tmp_path / "hf")
    modules, tables = after("convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", to)

    assert not modules & {*HEAVY, "typer.rich_utils"} - {"tomllib"}
    others = {"chatglm", "minimind", "meta", "torchtitan"}
    assert not {f"dcpconv.families.configs.{name}" for name in others} & modules
    assert len({name for name in modules if name.startswith("dcpconv.")}) <= 101
    assert set(tables) <= {"hf-llama", "minimind3", to}


@pytest.mark.parametrize("command", ["fingerprint", "diff"])
def test_what_only_reads_imports_nothing_that_writes(tmp_path: Path, command: str) -> None:
    source = str(save_hf(tiny("llama"), tmp_path / "hf"))
    modules, _ = after(command, source, *([source] if command == "diff" else []))

    assert not modules & {*HEAVY, "typer.rich_utils"} - {"tomllib"}
    writing = {"cast", "copying", "execute", "passing", "publish", "threads", "units"}
    assert not modules & {f"dcpconv.engine.{name}" for name in writing}


def test_the_list_of_commands_says_what_each_says_of_itself() -> None:
    for name, entry in COMMANDS.items():
        text = " ".join(CliRunner().invoke(app, [name, "--help"]).stdout.split())
        assert entry.line in text, name
    listed = " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())
    assert all(f"{name} {entry.line}" in listed for name, entry in COMMANDS.items())


def test_a_misspelt_command_is_told_the_right_one() -> None:
    found = CliRunner().invoke(app, ["convrt"])

    assert found.exit_code == 2
    assert "No such command 'convrt'" in found.stderr


@pytest.mark.parametrize(
    ("words", "what"),
    [
        pytest.param(["--chunks", "0"], "--chunks", id="bound"),
        pytest.param(["--chunks", "x"], "--chunks", id="number"),
        pytest.param(["--nonsense"], "--nonsense", id="option"),
    ],
)
def test_values_that_need_checking_are_checked(words: list[str], what: str) -> None:
    found = CliRunner().invoke(app, ["convert", "a", "b", *words])

    assert found.exit_code == 2
    assert what in found.stderr


def test_a_missing_argument_is_named() -> None:
    found = CliRunner().invoke(app, ["convert", "a"])

    assert found.exit_code == 2
    assert "DST" in found.stderr
