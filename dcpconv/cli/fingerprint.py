"""``dcpconv fingerprint``."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcpconv.cli.answers import answers_of, note, say
from dcpconv.cli.options import Assets, From, Jobs, KeymapFile, Of, Only, Rank, Spec
from dcpconv.cli.ranks import reading, seat_of

if TYPE_CHECKING:
    from dcpconv.plan.fingerprints import Fingerprint


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
    rank: Rank = None,
    of: Of = None,
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
    with reading(seat_of(rank, of), source, "fingerprint SRC") as ranks:
        is_heard = ranks is None or ranks.is_first
        with bar("reading", quiet=not is_heard) as shown:
            found = run(
                source,
                from_=from_,
                keymap=keymap,
                assets=assets,
                spec=spec or (),
                only=only,
                stored=stored,
                jobs=jobs,
                ranks=ranks,
                **calls(shown),
            )
        if is_heard:
            _deliver(found, output, as_json=as_json)


def _deliver(found: Fingerprint, output: str | None, *, as_json: bool) -> None:
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
