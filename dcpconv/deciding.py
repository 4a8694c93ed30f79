"""What the user asked for, turned into a conversion of which nothing is left to decide.

Only headers are read: what is decided here is what ``--dry-run`` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dcpconv import splitting
from dcpconv.aside import taken_up, with_aside
from dcpconv.catalog import Catalog, Form
from dcpconv.configs import read_spec
from dcpconv.coverage import Coverage
from dcpconv.dtypes import DType
from dcpconv.formats import metashards
from dcpconv.idle import SELECTION_BIAS, without_idle
from dcpconv.job import Job, block_size, most_used
from dcpconv.keymaps import Keymap, read_keymap
from dcpconv.naming import find_spec, settle, target_keymap
from dcpconv.outline import Outline, OutTensor
from dcpconv.plan import make_plan, row_chunks, whole
from dcpconv.publish import check_target
from dcpconv.recognition import Weights
from dcpconv.report import ConversionReport
from dcpconv.selection import select
from dcpconv.side_files import SideFiles, dequantized
from dcpconv.spec import ModelSpec
from dcpconv.summary import summarise


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; see ``convert``."""

    source: Path
    target: Path
    form: Form | None
    to: str | None
    from_: str | None
    keymap: Path | None
    root: str | None
    only: str | None
    dtype: DType | None
    cast_all: bool
    dequantize: bool
    allow: tuple[str, ...]
    assets: Path | None
    sizes: Mapping[str, str]
    chunks: int
    model_parallel: int
    max_file_size: int | None
    overwrite: bool
    trust: bool

    def check_target(self) -> None:
        """Raises early, before anything is read, where the target cannot be written."""
        is_split = self.to == "meta" and self.model_parallel > 1
        form = self.form or default_form("hf", self.target, self.to)
        check_target(
            self.target,
            overwrite=self.overwrite,
            is_file=form == "torch" and not is_split,
            source=self.source,
        )

    def plain_form(self) -> Form | None:
        """Form of the target if torch's own two functions do all that is asked, else ``None``."""
        from dcpconv import torch_engine  # noqa: PLC0415 - imports torch

        own = torch_engine.form_of(self.source)
        form = self.form or default_form(own, self.target, self.to)
        changes = (self.to, self.from_, self.keymap, self.root, self.only, self.dtype, self.assets)
        is_verbatim = not any(change is not None for change in (*changes, self.max_file_size))
        is_verbatim = is_verbatim and self.chunks == 1 and not self.sizes
        return form if is_verbatim and {own, form} == {"torch", "dcp"} else None


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
        *notes,
        *aside_notes,
        *side.notes,
        *job.notes(coverage),
    )
    report = summarise(job, coverage, tensors, outline, side, all_notes)
    return Decided(job, tensors, planned, outline, side, report)


def default_form(source: Form, target: Path, to: str | None = None) -> Form:
    """The form that a target's name and the source suggest."""
    if target.suffix in {".pth", ".pt", ".bin"}:
        return "torch"
    family_is_hf = to is None or to == "hf" or to.startswith("hf-")
    return "hf" if source == "dcp" and family_is_hf else "dcp"


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
