"""What the user asked for, turned into a conversion of which nothing is left to decide.

Only headers are read: what is decided here is what ``--dry-run`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from dcpconv.conversion.job import Job, most_used
from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.request import Request
from dcpconv.conversion.summary import summarise
from dcpconv.core.catalog import Catalog, Form
from dcpconv.core.outline import Outline, OutTensor
from dcpconv.engine.space import block_size
from dcpconv.families.side_files import SideFiles, dequantized
from dcpconv.plan.account import Aim, aim
from dcpconv.plan.coverage import Coverage
from dcpconv.plan.fills import make_plan, row_chunks, whole
from dcpconv.sources.adapters.spotting import beside_note, require_model
from dcpconv.sources.said import SELECTION_BIAS
from dcpconv.sources.selection import require_tensors
from dcpconv.sources.understanding import understand


@dataclass(frozen=True, slots=True)
class Decided:
    """A conversion of which nothing is left to decide.

    Attributes:
        job: What is converted into what.
        tensors: The plan: every tensor of the result.
        planned: The same as they are written: where ranks share a tensor, every rank's share.
        outline: Where every byte will be.
        side: Files beside the weights.
        report: What there is to say, before anything has moved.
    """

    job: Job
    tensors: tuple[OutTensor, ...]
    planned: tuple[OutTensor, ...]
    outline: Outline
    side: SideFiles
    report: ConversionReport


def require_model_in(everything: Catalog, request: Request) -> None:
    """Raises for what no engine makes a result of, whoever reads and writes the bytes.

    Raises:
        FormatError: It is no model.
        CoverageError: Keys are missing, unknown or misshapen; all are listed.
    """
    form = request.wanted.form_from(everything.form)
    source = understand(request.source, request.said, catalog=everything)
    going, _ = _taken_up(aim(source, form=form))
    job = Job(going, request.wanted, form)
    coverage, _ = job.cover()
    coverage.require(request.source, hint=_coverage_hint(coverage, job))
    require_tensors(source.catalog, coverage.targets)


def decide(everything: Catalog, request: Request) -> Decided:
    """Accounts for every key and plans every byte; only headers are read."""
    wanted = request.wanted
    form = wanted.form_from(everything.form)
    require_model(everything, is_hf=form == "hf", is_merged=bool(request.adapters))
    source = understand(
        request.source,
        request.said,
        only=request.only,
        root=_source_root(wanted.root, form, everything),
        catalog=everything,
    )
    going, kept_notes = _taken_up(aim(source, to=wanted.to, form=form))
    merge_notes: tuple[str, ...] = ()
    if request.adapters:
        from dcpconv.plan.adapting import merged_into  # noqa: PLC0415 - most have none

        going, merge_notes = merged_into(going, request.adapters)
    job = Job(going, wanted, form)
    coverage, notes = job.cover()
    coverage.require(request.source, hint=_coverage_hint(coverage, job))
    tensors, planned, outline = _laid_out(job, coverage)
    require_tensors(source.catalog, tensors)
    aside_notes: tuple[str, ...] = ()
    if coverage.aside:
        from dcpconv.conversion.aside import with_aside  # noqa: PLC0415 - one family has some

        outline, aside_notes = with_aside(
            outline,
            coverage,
            going.weights.keymap,
            modulus=block_size(wanted.path),
            is_one_file=job.is_one_file,
        )
    side = job.side_files(coverage, tensors)
    if request.said.dequantize:
        side = dequantized(side, most_used(tensors))
    all_notes = (
        *source.notes,
        *going.doubts,
        *kept_notes,
        *merge_notes,
        *(() if request.adapters else beside_note(source.catalog.source)),
        *notes,
        *aside_notes,
        *side.notes,
        *job.notes(coverage),
    )
    report = summarise(job, coverage, tensors, outline, side, tuple(dict.fromkeys(all_notes)))
    return Decided(job, tensors, planned, outline, side, report)


def _taken_up(going: Aim) -> tuple[Aim, tuple[str, ...]]:
    """The aim with what was kept aside beside its source, if the target has a place for it."""
    if going.table is None or not (going.table.aside or going.table.kept):
        return going, ()
    from dcpconv.plan.taking_up import take_up  # noqa: PLC0415 - one family has some

    return take_up(going)


def _laid_out(
    job: Job, coverage: Coverage
) -> tuple[tuple[OutTensor, ...], tuple[OutTensor, ...], Outline]:
    """Every tensor of the result, the same as they are written, and where every byte will be."""
    chunks = job.wanted.chunks
    tensors = make_plan(
        coverage,
        path_of=job.path_of,
        regions=(lambda shape: row_chunks(shape, chunks)) if job.form == "dcp" else whole,
        dtype_of=job.dtype_of,
    )
    ranks = job.wanted.ranks(job.form)
    if ranks == 1:
        return tensors, tensors, job.outline(tensors)
    from dcpconv.conversion import model_parallel  # noqa: PLC0415 - only for Meta's ranks

    shares = model_parallel.shares(
        coverage, ranks, spec=job.aim.spec, path_of=job.path_of, dtype_of=job.dtype_of
    )
    outline = model_parallel.outline(shares, modulus=block_size(job.target))
    return tensors, tuple(chain.from_iterable(shares)), outline


def _source_root(root: str | None, form: Form, catalog: Catalog) -> str | None:
    """``--root`` names the container in the result; in an hf result there is none to name, so it
    then says where the weights of the source are."""
    return root if form == "hf" and root is not None and catalog.form != "hf" else None


def _coverage_hint(coverage: Coverage, job: Job) -> str | None:
    if coverage:
        return None
    from dcpconv.formats.torchfile import meta_ranks  # noqa: PLC0415 - only errors need it
    from dcpconv.formats.torchfile.meta_scales import SCALE  # noqa: PLC0415

    if meta_ranks.is_part(job.catalog.source):
        return "this is one rank's share of a model-parallel release; give its directory"
    if coverage.misshapen and job.aim.spec is not None:
        return "the config does not describe these tensors; is it the right one?"
    if any(fault.key.endswith(SCALE) for fault in coverage.unknown):
        return "--dequantize multiplies the experts by the scales beside them"
    if any("layer.router_bias" in fault.slots for fault in coverage.unknown):
        return f"--allow {SELECTION_BIAS} leaves the bias out; experts are then chosen without it"
    if coverage.unknown and job.aim.spec is None and job.aim.source.said.assets is None:
        return "--assets DIR names a config; --keymap FILE adds keys to a table"
    return None
