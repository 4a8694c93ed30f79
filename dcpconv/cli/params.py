"""``dcpconv params``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcpconv.cli.answers import answers_of, note
from dcpconv.cli.options import From, Output, Spec


@answers_of("source")
def params(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint, or its config.json or params.json.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Family of the parameter file: lingua, hf, meta, minimind4, ...", metavar="FAMILY"
        ),
    ] = "lingua",
    from_: From = None,
    spec: Spec = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Leave out a feature that the family cannot express.", metavar="NAME"),
    ] = None,
    output: Output = None,
) -> None:
    """Write params.json from a config.json, or config.json from a params.json.

    If the family cannot express the model, the command refuses with all reasons.  SRC needs neither
    file if shapes and --spec give every number.
    """
    from dcpconv.conversion.parameters import parameters

    result = parameters(source, to=to, from_=from_, spec=spec or (), allow=allow or ())
    if output is None:
        typer.echo(result.text, nl=False)
    else:
        Path(output).write_text(result.text, encoding="utf-8")
    for text in result.notes:
        note(text)
