"""``dcpconv keys``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dcpconv.cli.answers import answers_of
from dcpconv.cli.options import From, KeymapFile, Output


@answers_of("source")
def keys(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint of any form, or a hub id.")
    ],
    from_: From = None,
    keymap: KeymapFile = None,
    output: Output = None,
) -> None:
    """Write the list of keys, shapes and types of a checkpoint, to commit and to check against.

    dcpconv keys out/checkpoint -o expected.json

    dcpconv check out/other --against expected.json
    """
    from dcpconv.sources.key_lists import to_text
    from dcpconv.sources.said import Said
    from dcpconv.sources.understanding import understand

    said = Said.parse(from_=from_ or None, keymap=keymap)
    text = to_text(understand(source, said).weights)
    if output is None:
        sys.stdout.write(text)
    else:
        Path(output).write_text(text, encoding="utf-8")
