"""``dcpconv keys``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dcpconv.cli.answers import answers
from dcpconv.cli.options import From, KeymapFile, Output


@answers
def keys(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint of any form, or a hub id.")
    ],
    from_: From = None,
    keymap: KeymapFile = None,
    output: Output = None,
) -> None:
    """Write the list of keys, shapes and types of a checkpoint: commit it, and check against it.

    dcpconv keys out/checkpoint -o expected.json

    dcpconv check out/other --against expected.json
    """
    from dcpconv.families.keymaps import read_keymap
    from dcpconv.sources.key_lists import to_text
    from dcpconv.sources.opening import open_side
    from dcpconv.sources.recognition import recognise
    from dcpconv.sources.settling import named_keymap

    side = open_side(source)
    own = read_keymap(Path(keymap)) if keymap is not None else None
    named = named_keymap(from_ or None, own, side.spec)
    text = to_text(recognise(side.catalog, spec=side.spec, keymap=named))
    if output is None:
        sys.stdout.write(text)
    else:
        Path(output).write_text(text, encoding="utf-8")
