"""``dcpconv runs``: the checkpoints of a training run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dcpconv.cli.answers import answers, answers_of, note, say, say_json
from dcpconv.cli.options import Assets, Deep, From, Of, Rank, Spec
from dcpconv.cli.ranks import reading, seat_of
from dcpconv.cli.run_tables import lines, pruning_lines, stripping_lines
from dcpconv.cli.words import count, size
from dcpconv.core.printing import printable

runs = typer.Typer(
    name="runs",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find, choose, check and keep the checkpoints of a training run.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunDir = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="The directory in which a run keeps its steps.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Everything as JSON.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Verify the step first, as `runs verify` does.")
]
Yes = Annotated[
    bool, typer.Option("--yes", help="Delete; without it, only report what would be deleted.")
]


@runs.command("list")
@answers_of("run_dir", "wanted")
def list_steps(run_dir: RunDir, as_json: AsJson = False) -> None:
    """List every step, complete or not, in the order of their numbers.

    The exit code is 1 if there is none.
    """
    from dcpconv.runs import find_checkpoints

    steps = find_checkpoints(_existing(run_dir))
    if as_json:
        say_json([step.to_json() for step in steps])
    else:
        for line in lines(steps):
            say(printable(line))
    if not steps:
        note(printable(f"no step of a known layout in {run_dir}"))
        raise typer.Exit(1)


@runs.command()
@answers_of("run_dir", "wanted")
def latest(
    run_dir: RunDir,
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="The run, if MiniMind keeps several there: pretrain."),
    ] = None,
    as_json: AsJson = False,
    verify: Verify = False,
) -> None:
    """Print the path of the latest complete step, and nothing else.

    Incomplete steps are skipped, each with a note.  The exit code is 1 if none is complete.

    dcpconv runs latest checkpoints pretrain      # one of several MiniMind runs
    """
    from dcpconv.runs.finding import latest_first
    from dcpconv.runs.verifying import verified

    for step in latest_first(_existing(run_dir), run):
        judged = verified(step) if verify and step.is_complete else step
        if judged.is_complete:
            say_json(step.to_json()) if as_json else _say_path(step.path)
            return
        note(printable(f"{step.path.name} was skipped: {judged.why_not}"))
    note(printable(f"no complete step in {run_dir}"))
    raise typer.Exit(1)


@runs.command()
@answers_of("run_dir", "wanted")
def resolve(
    run_dir: RunDir,
    wanted: Annotated[
        str,
        typer.Argument(
            metavar="WANTED",
            help="latest, auto, best:METRIC:min, a step's number, a path, or no.",
        ),
    ],
    as_json: AsJson = False,
    verify: Verify = False,
) -> None:
    """Print the path of the step that WANTED means; nothing for a fresh start.

    dcpconv runs resolve out auto      # the latest complete step, or nothing

    dcpconv runs resolve out 500       # that step, or an error

    dcpconv runs resolve out best:eval_loss:min
    """
    from dcpconv.runs import resolve_checkpoint

    step = resolve_checkpoint(wanted, run_dir, verify=verify)
    if as_json:
        say_json(step.to_json() if step else None)
    elif step is not None:
        _say_path(step.path)
    else:
        note("a fresh start")


@runs.command()
@answers_of("run_dir", "wanted")
def verify(
    run_dir: RunDir,
    as_json: AsJson = False,
    deep: Deep = False,
    rank: Rank = None,
    of: Of = None,
) -> None:
    """Open every form of every step and list what is wrong; nothing is executed.

    The exit code is 1 if anything is wrong or there is no step.
    """
    from dcpconv.runs import verify_checkpoints

    found, reasons = [], []
    seat = seat_of(rank, of) if deep else None
    with reading(seat, run_dir, "runs verify RUN_DIR --deep") as ranks:
        is_heard = ranks is None or ranks.is_first
        for checked in verify_checkpoints(_existing(run_dir), deep=deep, ranks=ranks):
            found.append(checked.to_json())
            reasons += [f"{checked.step.path.name}: {text}" for text in checked.problems]
            if is_heard and not as_json:
                say(printable(f"{'ok' if checked else 'problem':<9} {checked.step.path}"))
                for text in (*checked.problems, *checked.notes):
                    say(printable(f"  {checked.step.path.name}: {text}"))
        is_good = bool(found and not reasons)
        if ranks is not None:
            ranks.agree(is_good, reasons or (() if found else ["there is no step"]))
        if is_heard and as_json:
            say_json(found)
        if is_heard and not found:
            note(printable(f"no step of a known layout in {run_dir}"))
    if not is_good:
        raise typer.Exit(1)


@runs.command()
@answers
def prune(
    run_dir: RunDir,
    keep_last: Annotated[
        int, typer.Option(help="Keep the N newest complete steps.", metavar="N", min=0)
    ] = 0,
    keep_every: Annotated[
        int,
        typer.Option(help="Keep every step whose number is a multiple of N.", metavar="N", min=0),
    ] = 0,
    keep_best: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep the step with the lowest or highest value: eval_loss:min.  Repeatable.",
            metavar="METRIC:min|max",
        ),
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete complete steps that no rule keeps; without --yes, only report them.

    It never deletes the newest complete step, an incomplete one, or one that a symbolic link needs.
    The steps that stay are verified first, as `runs verify` does.

    dcpconv runs prune out --keep-last 3 --keep-every 1000 --keep-best eval_loss:min
    """
    from dcpconv.runs import Best, Retention
    from dcpconv.runs import prune as run

    retention = Retention(
        keep_last=keep_last,
        keep_every=keep_every,
        keep_best=tuple(Best.parse(text) for text in keep_best or ()),
    )
    pruning = run(_existing(run_dir), retention, yes=yes)
    if as_json:
        say_json(pruning.to_json())
        return
    for line in pruning_lines(pruning):
        say(printable(line))
    for text in pruning.decision.notes:
        note(printable(text))


@runs.command()
@answers
def strip(
    run_dir: RunDir,
    keep_last: Annotated[
        int,
        typer.Option(help="Keep the N newest complete steps whole.", metavar="N", min=1),
    ] = 1,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete the optimizers of finished steps, and keep the weights; without --yes, only report.

    It never touches the newest complete step.

    dcpconv runs strip out --keep-last 2
    """
    from dcpconv.runs import strip as run

    stripping = run(_existing(run_dir), keep_last=keep_last, yes=yes)
    if as_json:
        say_json(stripping.to_json())
        return
    for line in stripping_lines(stripping):
        say(printable(line))


def _say_path(path: Path) -> None:
    """A path for a script: its bytes as they are, but nothing that a terminal acts on."""
    text = str(path)
    shown = "".join(c if "\ud800" <= c <= "\udfff" else printable(c) for c in text)
    if shown.isprintable():
        say(shown)
    else:  # a name that is not UTF-8
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(shown) + b"\n")


def _existing(run_dir: str) -> Path:
    from dcpconv.core.errors import NotACheckpointError
    from dcpconv.runs.errors import told
    from dcpconv.runs.listing import typed_path

    with told(run_dir):
        path = typed_path(run_dir)
        is_there = path.exists()
    if not is_there:
        raise NotACheckpointError("there is no such directory", [("path", run_dir)])
    return path


@runs.command()
@answers
def carry(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="MiniMind's *_resume.pth, checkpoint-N, or a DCP or Lingua step."
        ),
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="Where the result goes; must not exist yet.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Kind of DST: minimind, hf-trainer, dcp, lingua, torchtitan.", metavar="KIND"
        ),
    ],
    family: Annotated[
        str | None,
        typer.Option(help="Naming of DST's weights.  Default: that of KIND.", metavar="FAMILY"),
    ] = None,
    from_: From = None,
    assets: Assets = None,
    spec: Spec = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            help="Ranks that will resume: MiniMind's step is rescaled for them.", metavar="N", min=1
        ),
    ] = None,
    chunks: Annotated[
        int, typer.Option(help="Row chunks per tensor in a DCP: write for this many ranks.", min=1)
    ] = 1,
    jobs: Annotated[int | None, typer.Option(help="Threads.", min=1)] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace DST in one step when the result is complete."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what would be done, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Carry a training run with its optimizer to another trainer's checkpoint.

    Weights and moments are copied or relabelled alike, never cast; nothing in SRC is executed.

    dcpconv runs carry pretrain_512_resume.pth out/step-4000 --to dcp

    dcpconv runs carry out/step-8000 pretrain_512_resume.pth --to minimind --overwrite
    """
    from dcpconv.families.configs.patching import parse_pairs
    from dcpconv.runs.carrying import convert_run

    report = convert_run(
        source,
        target,
        to=to,  # type: ignore[arg-type]  # checked there
        family=family,
        from_=from_,
        assets=assets,
        sizes=parse_pairs(spec or ()),
        world_size=world_size,
        chunks=chunks,
        jobs=jobs,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if as_json:
        say_json(report.to_json())
        return
    say(printable(f"source    {report.source_kind:<10} {report.source_family:<12} {report.source}"))
    say(printable(f"target    {report.target_kind:<10} {report.target_family:<12} {report.target}"))
    say(f"weights   {count(report.weights, 'tensor')}, {report.relabelled:,} relabelled")
    groups = " + ".join(f"{number:,}" for number in report.groups)
    say(printable(f"optimizer {', '.join(report.moments)} of {groups} parameters"))
    say(printable(f"beside    {', '.join(report.beside) or '-'}"))
    for name, why in report.left:
        say(printable(f"left      {name}  {why}"))
    say(f"tensors   {size(report.nbytes)}{'; nothing was written' if report.is_dry_run else ''}")
    for text in report.notes:
        note(printable(text))
