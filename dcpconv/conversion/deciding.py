"""What the user asked for, turned into a conversion of which nothing is left to decide.

Only headers are read: what is decided here is what ``--dry-run`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from dcpconv.conversion import model_parallel as splitting
from dcpconv.conversion.aside import taken_up, with_aside
from dcpconv.conversion.job import Job, most_used
from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.request import Request, default_form
from dcpconv.conversion.summary import summarise
from dcpconv.core.catalog import Catalog, Form
from dcpconv.core.outline import Outline, OutTensor
from dcpconv.core.spec import ModelSpec
from dcpconv.engine.space import block_size
from dcpconv.families.configs import read_spec
from dcpconv.families.keymaps import Keymap, read_keymap
from dcpconv.families.side_files import SideFiles, dequantized
from dcpconv.formats.torchfile import meta_ranks as metashards
from dcpconv.plan.adapting import adapted
from dcpconv.plan.coverage import Coverage
from dcpconv.plan.fills import make_plan, row_chunks, whole
from dcpconv.plan.left_out import without_idle
from dcpconv.plan.refusals import SELECTION_BIAS
from dcpconv.sources.adapters.reading import beside_note, require_model
from dcpconv.sources.recognition import Weights
from dcpconv.sources.selection import select
from dcpconv.sources.settling import find_spec, settle, target_keymap


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


def decide(everything: Catalog, request: Request) -> Decided:
    """Accounts for every key and plans every byte; only headers are read."""
    catalog = select(everything, request.only)
    form = request.form or default_form(catalog.form, request.target, request.to)
    require_model(catalog, is_hf=form == "hf", is_merged=bool(request.adapters))
    own = read_keymap(request.keymap) if request.keymap else None
    config, config_notes = find_spec(catalog, request.assets)
    weights, spec, settled = settle(
        catalog,
        config,
        from_=request.from_,
        own=own,
        sizes=request.sizes,
        root=_source_root(request.root, form, catalog),
    )
    wanted = _target_keymap(request.to, own, weights, spec, form)
    weights, spec = without_idle(weights, spec, wanted, allow=request.allow)
    weights, kept_notes = taken_up(weights, wanted)
    weights, merge_notes = adapted(
        weights, request.adapters, spec=spec, dequantize=request.dequantize
    )
    catalog = weights.catalog
    if request.dequantize:
        wanted = wanted or weights.require_keymap()
    job = Job(
        catalog=catalog,
        weights=weights,
        wanted=wanted,
        spec=spec,
        form=form,
        target=request.target,
        assets=request.assets,
        root=request.root,
        dtype=request.dtype,
        cast_all=request.cast_all,
        allow=request.allow,
        ranks=request.model_parallel if form == "torch" and request.to == "meta" else 1,
        dequantize=request.dequantize,
    )
    if job.renames and spec is None and config_notes:
        read_spec(request.source)  # raises: another naming needs what the config says
    coverage, notes = job.cover()
    coverage.require(request.source, hint=_coverage_hint(coverage, job))
    tensors = make_plan(
        coverage,
        path_of=job.path_of,
        regions=(lambda shape: row_chunks(shape, request.chunks)) if form == "dcp" else whole,
        dtype_of=job.dtype_of,
    )
    planned = tensors
    if job.ranks > 1:
        shares = splitting.shares(
            coverage, job.ranks, spec=spec, path_of=job.path_of, dtype_of=job.dtype_of
        )
        planned = tuple(chain.from_iterable(shares))
        outline = splitting.outline(shares, modulus=block_size(request.target))
    else:
        outline = job.outline(tensors, max_file_size=request.max_file_size)
    outline, aside_notes = with_aside(
        outline,
        coverage,
        weights.keymap,
        modulus=block_size(request.target),
        is_one_file=job.is_one_file,
    )
    side = job.side_files(coverage, tensors)
    if request.dequantize:
        side = dequantized(side, most_used(tensors))
    all_notes = (
        *catalog.notes,
        *config_notes,
        *settled,
        *kept_notes,
        *merge_notes,
        *(() if request.adapters else beside_note(catalog.source)),
        *notes,
        *aside_notes,
        *side.notes,
        *job.notes(coverage),
    )
    report = summarise(job, coverage, tensors, outline, side, all_notes)
    return Decided(job, tensors, planned, outline, side, report)


def _target_keymap(
    to: str | None,
    own: Keymap | None,
    weights: Weights,
    spec: ModelSpec | None,
    form: Form,
) -> Keymap | None:
    """The table of the result, or ``None`` to keep keys as they are stored."""
    if to is not None:
        return target_keymap(to, own, weights.keymap, spec)
    if own is not None and weights.keymap is not own:
        return own
    if form == "hf" and weights.keymap is not None:
        if weights.keymap.family == "hf":
            return weights.keymap
        return target_keymap("hf", None, weights.keymap, spec)
    return None


def _source_root(root: str | None, form: Form, catalog: Catalog) -> str | None:
    """``--root`` names the container in the result; in an hf result there is none to name, so it
    then says where the weights of the source are."""
    return root if form == "hf" and root is not None and catalog.form != "hf" else None


def _coverage_hint(coverage: Coverage, job: Job) -> str | None:
    if metashards.is_part(job.catalog.source):
        return "this is one rank's share of a model-parallel release; give its directory"
    if coverage.misshapen and job.spec is not None:
        return "the config does not describe these tensors; is it the right one?"
    if any("layer.router_bias" in fault.slots for fault in coverage.unknown):
        return f"--allow {SELECTION_BIAS} leaves the bias out; experts are then chosen without it"
    if coverage.unknown and job.spec is None and job.assets is None:
        return "--assets DIR names a config; --keymap FILE adds keys to a table"
    return None
