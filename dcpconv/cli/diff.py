"""``dcpconv diff``."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from dcpconv.cli.answers import answers_of, judges, say, say_json
from dcpconv.cli.options import Assets, From, Html, Jobs, KeymapFile, Only, Spec

_COULD_NOT_TELL = 2


@judges
@answers_of("a", "b", "assets")
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint of any form, or a hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    tolerance: Annotated[
        float,
        typer.Option(help="Largest |a-b| that counts as the same.", min=0.0, metavar="NUMBER"),
    ] = 0.0,
    by: Annotated[
        str | None,
        typer.Option(help="Put tensors together: layer or slot.", metavar="KIND"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    html: Html = None,
    stored: Annotated[
        bool,
        typer.Option(
            "--stored", help="Compare keys and axes as they are stored, although tables know them."
        ),
    ] = False,
    only: Only = None,
    from_: From = None,
    keymap: KeymapFile = None,
    assets: Assets = None,
    spec: Spec = None,
    jobs: Jobs = None,
) -> None:
    """Compare the weights of two checkpoints of any forms and namings, what changed most first.

    Equal tensors are told by their bytes; the others are measured: largest and mean |a-b|, the
    norm of a-b relative to that of a, cosine, ratio of norms.
    Exit codes: 0 the same within the tolerance, 1 they differ, 2 dcpconv cannot tell.

    dcpconv diff weights/Llama-3-8B out/lingua

    dcpconv diff base finetuned --by layer
    """
    from dcpconv.cli.progress import bar, calls
    from dcpconv.comparing.diff import diff as run
    from dcpconv.comparing.text import lines
    from dcpconv.core.errors import DcpconvError

    if by not in {None, "layer", "slot"}:
        raise DcpconvError(f"cannot group by {by!r}", [("expected", "layer or slot")])
    gc.disable()  # millions of small objects without cycles, in a process that ends here
    with bar("comparing", quiet=False) as shown:
        found = run(
            a,
            b,
            tolerance=tolerance,
            only=only,
            stored=stored,
            from_=from_,
            keymap=keymap,
            assets=assets,
            spec=spec or (),
            jobs=jobs,
            **calls(shown),
        )
    if html is not None:
        from dcpconv.cli.pictures.page import write
        from dcpconv.cli.pictures.pages import diff_page

        write(html, diff_page(found))
    if as_json:
        value = found.to_json()
        if by is not None:
            value["groups"] = [group.to_json() for group in found.groups(by)]  # type: ignore[arg-type]  # checked above
        say_json(value)
    else:
        for line in lines(found, by=by):  # type: ignore[arg-type]  # checked above
            say(line)
    if not found:
        raise typer.Exit(1 if found.is_told else _COULD_NOT_TELL)
