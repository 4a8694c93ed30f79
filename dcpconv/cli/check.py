"""``dcpconv check``."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcpconv.cli.answers import answers_of, judges, say
from dcpconv.cli.options import Assets, From, Html, KeymapFile, Of, Rank, Spec
from dcpconv.cli.ranks import reading, seat_of

if TYPE_CHECKING:
    from dcpconv.plan.coverage import Coverage


@judges
@answers_of("source", "against", "assets")
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A checkpoint of any form, a hub id (org/name), or a key list."
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="Check whether SRC can become a complete checkpoint of this family.  With"
            " --against: the family of TARGET, or stored: the same keys on both sides.",
            metavar="FAMILY",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Check whether SRC has the keys and shapes of TARGET: a checkpoint of any form and"
            " family, a hub id, a config.json or params.json, a key list of `dcpconv keys`, or a"
            " manifest of `dcpconv fingerprint`.",
            metavar="TARGET",
        ),
    ] = None,
    from_: From = None,
    keymap: KeymapFile = None,
    assets: Assets = None,
    spec: Spec = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="A feature that may be lost because the family cannot express it.  Repeatable.",
            metavar="NAME",
        ),
    ] = None,
    dtypes: Annotated[
        bool,
        typer.Option(
            "--dtypes", help="Compare element types too; without it, differences are notes."
        ),
    ] = False,
    data: Annotated[
        bool,
        typer.Option(
            "--data",
            help="Read every tensor, and compare what it holds with --against the manifest of"
            " `dcpconv fingerprint`.",
        ),
    ] = False,
    rank: Rank = None,
    of: Of = None,
    html: Html = None,
    report: Annotated[
        str,
        typer.Option(
            help="text, json, junit (a test case per slot) or github (annotations; the table goes"
            " to -o or the job's summary).",
            metavar="KIND",
        ),
    ] = "text",
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the report here; stdout then gets the text.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Report whether a checkpoint fits, with every reason, from headers alone.

    Tensors are read only with --data.
    Without --to and --against, it checks that the files are whole and that SRC has every key of its
    own naming.
    Exit codes: 0 it fits, 1 it does not, 2 dcpconv cannot tell.

    dcpconv check weights/Llama-3-8B --to lingua

    dcpconv check out/checkpoint --against expected.json --report junit -o check.xml
    """
    from dcpconv.checking.check import check as run
    from dcpconv.checking.reports import KINDS
    from dcpconv.cli.progress import bar, calls
    from dcpconv.core.errors import DcpconvError

    if report not in KINDS:
        raise DcpconvError(
            f"there is no report {report!r}", [("expected", f"one of {', '.join(KINDS)}")]
        )
    gc.disable()  # millions of small objects without cycles, in a process that ends here
    command = "check SRC --data --against FILE"
    with reading(seat_of(rank, of) if data else None, source, command) as ranks:
        is_heard = ranks is None or ranks.is_first
        with bar("reading", quiet=not (data and is_heard)) as shown:
            coverage = run(
                source,
                to=to,
                against=against,
                from_=from_,
                keymap=keymap,
                assets=assets,
                spec=spec or (),
                allow=allow or (),
                dtypes=dtypes,
                data=data,
                ranks=ranks,
                **calls(shown),
            )
        if ranks is not None:
            ranks.agree(bool(coverage), (f"{label}  {text}" for label, text in coverage.facts()))
        if is_heard:
            if html is not None:
                from dcpconv.cli.pictures.page import write
                from dcpconv.cli.pictures.pages import coverage_page

                write(html, coverage_page(coverage))
            _deliver(coverage, report, output)
    if not coverage:
        raise typer.Exit(1)


def _deliver(coverage: Coverage, report: str, output: str | None) -> None:
    """Writes the report where it belongs, and something for people to stdout."""
    from dcpconv.checking.reports import render

    if report == "github":
        from dcpconv.checking.reports.github import commands

        for line in commands(coverage):
            say(line)
        # GitHub makes this file per step; several commands add to it.
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if output is None and summary:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(render(coverage, report))
    elif output is None:
        sys.stdout.write(render(coverage, report))
    if output is not None:
        Path(output).write_text(render(coverage, report), encoding="utf-8")
    if output is not None or report == "github":
        sys.stdout.write(render(coverage, "text"))
