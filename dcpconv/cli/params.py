"""``dcpconv params``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcpconv.cli.answers import answers, note
from dcpconv.cli.options import Output


@answers
def params(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint, or its config.json or params.json.")
    ],
    to: Annotated[
        str, typer.Option(help="Whose parameter file: lingua or hf.", metavar="FAMILY")
    ] = "lingua",
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Leave out a feature that the family cannot express.", metavar="NAME"),
    ] = None,
    output: Output = None,
) -> None:
    """Write params.json from a config.json, or config.json from a params.json.

    Refuses, with all reasons, what the family cannot express.
    """
    from dcpconv.parameters import parameters

    result = parameters(Path(source), to=to, allow=allow or ())
    if output is None:
        typer.echo(result.text, nl=False)
    else:
        Path(output).write_text(result.text, encoding="utf-8")
    for text in result.notes:
        note(text)
