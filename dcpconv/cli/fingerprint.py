"""``dcpconv fingerprint``."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer

from dcpconv.cli.answers import answers_of, note, say
from dcpconv.cli.options import Assets, From, Jobs, KeymapFile, Only, Spec


@answers_of("source", "assets")
def fingerprint(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint of any form, or a hub id.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="The manifest: the digest of every tensor, as JSON.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the manifest here, to commit and to check against.",
            metavar="FILE",
        ),
    ] = None,
    stored: Annotated[
        bool,
        typer.Option(
            "--stored", help="Take keys and axes as they are stored, although a table knows them."
        ),
    ] = False,
    only: Only = None,
    from_: From = None,
    keymap: KeymapFile = None,
    assets: Assets = None,
    spec: Spec = None,
    jobs: Jobs = None,
) -> None:
    """Print one digest of a model's weights: the same in every form, naming and sharding.

    It differs if one element differs, or its type.  Of a model that no table knows it is over keys
    as they are stored, and says so: dcpconv1-stored.  docs/fingerprints.md defines it.

    dcpconv fingerprint weights/Llama-3-8B -o llama.json

    dcpconv check out/checkpoint --against llama.json --data
    """
    from dcpconv.cli.progress import bar, calls
    from dcpconv.comparing.fingerprint import fingerprint as run

    gc.disable()  # millions of small objects without cycles, in a process that ends here
    with bar("reading", quiet=False) as shown:
        found = run(
            source,
            from_=from_,
            keymap=keymap,
            assets=assets,
            spec=spec or (),
            only=only,
            stored=stored,
            jobs=jobs,
            **calls(shown),
        )
    if output is not None:
        found.write(Path(output))
    if as_json:
        sys.stdout.writelines(f"{line}\n" for line in found.manifest())
    else:
        say(found.digest)
    for key, why in found.left_out:
        note(f"{key} takes no part: {why}")
    for text in found.notes:
        note(text)
