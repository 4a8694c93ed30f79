"""``dcpconv convert``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcpconv.cli.answers import answers_of, is_watched, note, say, say_json
from dcpconv.cli.options import Assets, From, Jobs, KeymapFile, Of, Rank, Spec
from dcpconv.cli.ranks import naming, seat_of
from dcpconv.cli.words import count, parse_size, size

if TYPE_CHECKING:
    from dcpconv.conversion.convert import Progress
    from dcpconv.conversion.report import ConversionReport
    from dcpconv.engine.worlds.seats import Seat

_LISTED = 4
"""Names printed before the rest is only counted; --json has them all."""

_SPEED_FROM = 64 << 20
"""Bytes; the time of a smaller result is start-up and sync, and a speed would mislead."""


@answers_of("source", "target", "assets", "adapter")
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint: a directory, a file, or a hub id.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="Where the result goes; must not exist yet.")
    ],
    form: Annotated[
        str | None,
        typer.Option(
            help="Form of DST: hf, torch or dcp.  Default: torch for *.pth and *.pt, hf when SRC is"
            " a DCP, dcp otherwise.",
            metavar="FORM",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Naming of DST (see `dcpconv families`), or stored: SRC's own keys, whatever they"
            " are.  Default: hf for the hf form where a table is for the model, else stored.",
            metavar="FAMILY",
        ),
    ] = None,
    from_: From = None,
    keymap: KeymapFile = None,
    root: Annotated[
        str | None,
        typer.Option(
            help="Key above the weights in a dcp or torch DST; '' for none.  Default: the family's"
            " (model for lingua).",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Take only what is under this key (model), or keys that match this pattern"
            " ('layers.0.*').",
            metavar="KEY",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Cast floating-point tensors of two or more dims: bf16, fp16, fp32.  Norm weights,"
            " biases and integers keep their type.",
        ),
    ] = None,
    cast_all: Annotated[
        bool, typer.Option("--cast-all", help="With --dtype: cast vectors and scalars too.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out a feature that DST's family cannot express (rope_scaling, ...), or let"
            " a cast overflow (overflow).  Repeatable, or with commas.",
            metavar="NAME",
        ),
    ] = None,
    assets: Assets = None,
    spec: Spec = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter to merge into SRC: PEFT directory, hub id, MiniMind file or DCP."
            "  DIR:0.5 adds half of it.  Repeatable.",
            metavar="DIR",
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Multiply fp8, MXFP8, MXFP4 and int8 weights by their scales, into bf16 or"
            " --dtype.",
        ),
    ] = False,
    chunks: Annotated[
        int,
        typer.Option(
            help="Row chunks per tensor in a dcp DST: write for this many ranks, and each reads"
            " only its own bytes.",
            min=1,
        ),
    ] = 1,
    max_file_size: Annotated[
        str | None,
        typer.Option(
            help="At most this many bytes of tensors in one file: 5GB, 512MiB.", metavar="SIZE"
        ),
    ] = None,
    model_parallel: Annotated[
        int,
        typer.Option(
            help="Files of a torch DST --to meta or meta-llama4, which is then a directory of"
            " consolidated.0N.pth: one per rank of Meta's own code.",
            metavar="N",
            min=1,
        ),
    ] = 1,
    jobs: Jobs = None,
    engine: Annotated[
        str,
        typer.Option(
            help="stream, or torch: use torch's own functions, with the whole model in memory, for"
            " files that the streaming engine refuses.",
            metavar="ENGINE",
        ),
    ] = "stream",
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="With --engine torch: run the code that a pickle in SRC names, if torch's"
            " restricted unpickler refuses it.",
        ),
    ] = False,
    fingerprint: Annotated[
        bool,
        typer.Option(
            "--fingerprint",
            help="Take the fingerprint of DST while it is written and report it; its manifest is"
            " dcpconv_fingerprint.json in a directory, and NAME.dcpconv_fingerprint.json beside a"
            " file.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace DST in one step when the result is complete."),
    ] = False,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache", help="Download a hub id into the hub's own cache, and read it from there."
        ),
    ] = False,
    rank: Rank = None,
    of: Of = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what would be done, and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Convert a checkpoint into another form, another naming, or both.

    Memory does not grow with the model.  DST appears whole or not at all, and SRC is only read.

    dcpconv convert weights/Llama-3-8B out/llama --to lingua     # before torchrun

    dcpconv convert dump/checkpoints/0000001000 out/hf             # back, for evaluation
    """
    from dcpconv.core.errors import DcpconvError

    seat = seat_of(rank, of)
    with naming(seat), _telling(None if dry_run else seat, target):
        from dcpconv.conversion.convert import convert as run

        if form not in {None, "hf", "torch", "dcp"}:
            raise DcpconvError(f"there is no form {form!r}", [("expected", "hf, torch or dcp")])
        most = parse_size(max_file_size)
    has_bar = seat is None or seat.rank == 0  # that of all ranks
    with (
        naming(seat),
        _progress(quiet=quiet or dry_run or as_json or not has_bar) as progress,
    ):
        report = run(
            source,
            target,
            form=form,  # type: ignore[arg-type]  # checked above
            to=to,
            from_=from_,
            keymap=keymap,
            root=root,
            only=only,
            dtype=dtype,
            cast_all=cast_all,
            allow=allow or (),
            assets=assets,
            spec=spec or (),
            adapter=adapter or (),
            dequantize=dequantize,
            chunks=chunks,
            model_parallel=model_parallel,
            max_file_size=most,
            jobs=jobs,
            engine=engine,  # type: ignore[arg-type]  # checked inside
            trust=trust,
            fingerprint=fingerprint,
            overwrite=overwrite,
            cache=cache,
            dry_run=dry_run,
            progress=progress,
            rank=seat.rank if seat else 0,
            of=seat.size if seat else 1,
            run=seat.run if seat else "",
        )
    is_heard = seat is None or seat.rank == report.published_by  # one speaks for all
    if as_json and is_heard:
        say_json(report.to_json())
        return
    if is_heard and not quiet:
        for line in lines(report):
            say(line)
        for text in report.notes:
            note(text)


def lines(report: ConversionReport) -> Iterator[str]:
    """The report as aligned lines, one fact each."""
    for label, side in (("source", report.source), ("target", report.target)):
        yield (
            f"{label:<9} {side.form:<6} {side.family:<10} {count(side.files, 'file'):>8}"
            f"  {count(side.tensors, 'key'):>10}  {size(side.nbytes):>10}"
            f"  {'+'.join(side.dtypes) or '-'}  {side.path}"
        )
    yield f"copied    {count(report.copied, 'tensor')} as they are"
    for item in report.relabelled:
        yield (
            f"relabel   {count(item.tensors, 'tensor')}  {item.source_layout} ->"
            f" {item.target_layout}"
        )
    if report.merged:
        yield f"merged    {count(report.merged, 'tensor')} with what the adapter adds"
    if report.cast:
        yield f"cast      {count(report.cast, 'tensor')} to {report.target.dtypes[0]}"
    for loss in report.lossy:
        yield (
            f"lossy     {loss.key}  {loss.overflowed:,} overflowed,"
            f" {loss.underflowed:,} became zero"
        )
    yield from _listed("tied", [f"{key} = {owner}" for key, owner in report.tied])
    yield from _listed("ignored", [f"{key}  {reason}" for key, reason in report.ignored])
    if report.left:
        yield f"left      {count(len(report.left), 'key')} beside the weights"
    yield from _listed("allowed", [f"{name}  {why}" for name, why in report.allowed])
    if report.side_files:
        yield f"beside    {', '.join(report.side_files)}"
    if report.is_dry_run:
        yield f"disk      {size(report.disk_nbytes)} needed; nothing was written (--dry-run)"
        return
    if report.fingerprint:
        read = report.fingerprint_nbytes
        how = f"{size(read)} read for it" if read else "taken while it was written"
        yield f"digest    {report.fingerprint}  {how}"
    yield from _ranks(report)
    moved = ", ".join(f"{size(nbytes)} {name}" for name, nbytes in report.moved.items())
    yield f"moved     {moved or 'nothing'}"
    time = f"time      {report.seconds:.2f} s"
    if report.target.nbytes >= _SPEED_FROM and report.seconds:
        time += f", {size(report.target.nbytes / report.seconds)}/s"
    yield time


def _telling(seat: Seat | None, target: str) -> AbstractContextManager[None]:
    """Tells the other processes what fails."""
    if seat is None:
        return nullcontext()
    from dcpconv.engine.worlds.early import telling

    return telling(target, seat)


def _ranks(report: ConversionReport) -> Iterator[str]:
    """What each rank wrote, and which one the others waited for."""
    if not report.shares:
        return
    yield from _listed(
        "rank",
        [
            f"{share.rank}  {size(share.nbytes)} in {share.seconds:.2f} s on {share.host}"
            for share in report.shares
        ],
    )
    slowest = max(report.shares, key=lambda share: share.seconds)
    yield f"slowest   rank {slowest.rank} on {slowest.host}, {slowest.seconds:.2f} s"
    if report.resumed:
        yield f"resumed   {size(report.resumed)} that an earlier run had written"


def _listed(label: str, items: Any) -> Iterator[str]:
    for item in items[:_LISTED]:
        yield f"{label:<9} {item}"
    if len(items) > _LISTED:
        yield f"{label:<9} and {len(items) - _LISTED:,} more"


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    if quiet or not is_watched():
        yield None
        return
    from dcpconv.cli.progress import bar

    with bar("moving", quiet=quiet) as shown:
        yield None if shown is None else lambda at: shown.show(at.done, at.total)
