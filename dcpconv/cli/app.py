"""``dcpconv COMMAND``: each command in a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from dcpconv.cli.check import check
from dcpconv.cli.convert import convert
from dcpconv.cli.families import families
from dcpconv.cli.inspect import inspect
from dcpconv.cli.keys import keys
from dcpconv.cli.params import params
from dcpconv.cli.runs import runs

app = typer.Typer(
    name="dcpconv",
    help=(
        "Model weights between Hugging Face, torch.save and PyTorch Distributed Checkpoint:"
        " at the speed of the disk, in constant memory, exactly."
    ),
    epilog="Exit codes: 0 yes, 1 no (it does not fit), 2 could not tell.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert)
app.command()(check)
app.command()(keys)
app.command()(inspect)
app.command()(params)
app.command()(families)
app.add_typer(runs)


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
    app()
