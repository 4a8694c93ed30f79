"""``dcpconv COMMAND``: each command in a module of its own, imported when it is called."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

from dcpconv.cli.coercion import spare


class _Entry(NamedTuple):
    """Where a command is, and its line in the list of commands."""

    module: str
    line: str


COMMANDS: Mapping[str, _Entry] = {
    "convert": _Entry(
        "dcpconv.cli.convert", "Convert a checkpoint into another form, another naming, or both."
    ),
    "check": _Entry(
        "dcpconv.cli.check",
        "Report whether a checkpoint fits, with every reason, from headers alone.",
    ),
    "diff": _Entry(
        "dcpconv.cli.diff",
        "Compare the weights of two checkpoints of any forms and namings, what changed most first.",
    ),
    "fingerprint": _Entry(
        "dcpconv.cli.fingerprint",
        "Print one digest of a model's weights: the same in every form, naming and sharding.",
    ),
    "keys": _Entry(
        "dcpconv.cli.keys",
        "Write the list of keys, shapes and types of a checkpoint, to commit and to check against.",
    ),
    "inspect": _Entry(
        "dcpconv.cli.inspect",
        "Show what a checkpoint holds: keys, shapes, types, chunks, and the naming it is in.",
    ),
    "params": _Entry(
        "dcpconv.cli.params",
        "Write params.json from a config.json, or config.json from a params.json.",
    ),
    "families": _Entry(
        "dcpconv.cli.families",
        "List the namings that --to and --from take, or show one as a table of keys.",
    ),
    "runs": _Entry(
        "dcpconv.cli.runs", "Find, choose, check and keep the checkpoints of a training run."
    ),
}
"""The list says of each command what its own help says first; importing all of them for that takes
longer than most commands."""


class _Commands(TyperGroup):
    """Imports only the command that is called."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        spare(self)
        names: Any = dict.fromkeys(COMMANDS)
        self.commands = names  # what a misspelt one is compared with

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        found = getattr(import_module(COMMANDS[cmd_name].module), cmd_name)
        if not isinstance(found, typer.Typer):
            function, found = found, _typer(name=cmd_name)
            found.command(cmd_name)(function)
        return spare(get_command(found))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.line) for name, entry in COMMANDS.items()])


def _typer(**how: Any) -> typer.Typer:
    # Help is plain text: what draws boxes around it takes longer to import than all the rest.
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **how
    )


app = _typer(
    name="dcpconv",
    cls=_Commands,
    help=(
        "Converts model weights between Hugging Face, torch.save and PyTorch Distributed"
        " Checkpoint: exactly, at the speed of the disk, in constant memory."
    ),
    epilog="Exit codes: 0 yes, 1 no (it does not fit), 2 dcpconv cannot tell.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"dcpconv {version('dcpconv')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Runs the command line."""
    # What is imported stays: looking for garbage in it is a twentieth of a small conversion.
    gc.set_threshold(100_000, 50, 50)
    app()
