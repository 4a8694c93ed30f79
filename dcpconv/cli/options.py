"""Options that several commands share, each with one meaning and one help text."""

from __future__ import annotations

from typing import Annotated

import typer

From = Annotated[
    str | None,
    typer.Option("--from", help="Naming of SRC, if its keys fit several.", metavar="FAMILY"),
]
KeymapFile = Annotated[
    str | None, typer.Option("--keymap", help="A naming table of your own (TOML).", metavar="FILE")
]
Assets = Annotated[
    str | None,
    typer.Option(
        "--assets", help="Directory with config and tokenizer, if SRC has none.", metavar="DIR"
    ),
]
Spec = Annotated[
    list[str] | None,
    typer.Option(
        "--spec",
        help="Numbers of the model that no file states: heads=8,kv_heads=2.  Repeatable.",
        metavar="NAME=VALUE",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output", help="Write here instead of stdout.", metavar="FILE"),
]
Only = Annotated[
    str | None,
    typer.Option(help="Take only keys under this one, or that match.", metavar="KEY"),
]
Jobs = Annotated[
    int | None, typer.Option(help="Threads.  Default: one per core, 4 at most.", min=1)
]
Deep = Annotated[
    bool,
    typer.Option(
        "--deep",
        help="Read the weights, too, and compare them with the dcpconv_fingerprint.json that was"
        " written when they were saved.",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        help="Which of several processes this is that do this together, from 0; torchrun says it"
        " by itself.",
        metavar="I",
    ),
]
Of = Annotated[
    int | None,
    typer.Option(
        help="How many processes do this together; 1 below torchrun for this one alone.",
        metavar="N",
    ),
]
Html = Annotated[
    str | None,
    typer.Option(
        "--html",
        help="Write pictures here, too: one file that opens without a network.",
        metavar="FILE",
    ),
]
