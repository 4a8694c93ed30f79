"""docs/cli.md, made from the command line itself: every command with every option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from dcpconv.cli.app import app

_INTRO = """\
# Commands and options

Every command prints this with `--help`. Results go to stdout, progress and notes to stderr. The
exit code is 0 for yes or done, 1 for no, and 2 if dcpconv cannot tell. Ctrl-C gives 130, but 2 in
`check`, whose exit code is an answer.

<!-- Written by `make docs` from the command line; a test compares. -->
"""


def cli_page() -> str:
    """The whole page."""
    return "\n".join([_INTRO, *_lines("dcpconv", get_command(app))]).rstrip() + "\n"


def commands() -> Iterator[tuple[str, Any]]:
    """``dcpconv runs list`` and every other command, each with what carries it out."""
    yield from _below("dcpconv", get_command(app))


def _below(path: str, group: Any) -> Iterator[tuple[str, Any]]:
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "list_commands"):
            yield from _below(f"{path} {name}", command)
        else:
            yield f"{path} {name}", command


def _lines(path: str, group: Any) -> Iterator[str]:
    for name, command in _below(path, group):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([name, *(p.metavar or p.name.upper() for p in arguments)])
        yield f"## {name}"
        yield ""
        yield f"```\n{usage} [OPTIONS]\n```"
        yield ""
        yield from _paragraphs(command.help or "")
        yield "| | |"
        yield "| --- | --- |"
        for parameter in command.params:
            yield f"| {_spelled(parameter)} | {_cell(parameter.help or '')} |"
        yield ""


def _paragraphs(text: str) -> Iterator[str]:
    """The help of a command; a paragraph that is a command line is code."""
    for paragraph in text.split("\n\n"):
        is_code = paragraph.startswith("dcpconv ")
        yield f"```\n{paragraph.strip()}\n```" if is_code else paragraph.strip()
        yield ""


def _spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_cell(parameter.metavar or parameter.name.upper())}`"
    value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
    return f"`{_cell(', '.join(parameter.opts) + value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
