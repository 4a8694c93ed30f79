"""Converts a checkpoint of any form and naming into any other: catalog, plan, engine, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from dcpconv import splitting
from dcpconv.catalog import Catalog, Form
from dcpconv.configs import read_spec
from dcpconv.configs.patching import parse_pairs
from dcpconv.coverage import Coverage
from dcpconv.dtypes import BY_LABEL, BY_NAME, DType
from dcpconv.engine import Moved, execute
from dcpconv.errors import DcpconvError, FormatError, LossyCastError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.hub import locate
from dcpconv.idle import without_idle
from dcpconv.job import Job, block_size, disk_nbytes, most_used
from dcpconv.keymaps import Keymap, read_keymap
from dcpconv.naming import find_spec, named_keymap, settled_spec, target_keymap
from dcpconv.outline import Outline, OutTensor
from dcpconv.plan import make_plan, row_chunks, whole
from dcpconv.publish import check_space, check_target, staging
from dcpconv.recognition import Weights, recognise
from dcpconv.report import ConversionReport
from dcpconv.selection import select
from dcpconv.side_files import SideFiles, dequantized
from dcpconv.space import spared
from dcpconv.spec import ModelSpec
from dcpconv.summary import labels, lossy_casts, summarise

Engine = Literal["stream", "torch"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is; both numbers count payload bytes of the result."""

    done: int
    total: int


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    form: Form | None = None,
    to: str | None = None,
    from_: str | None = None,
    keymap: str | os.PathLike[str] | None = None,
    root: str | None = None,
    only: str | None = None,
    dtype: str | None = None,
    cast_all: bool = False,
    dequantize: bool = False,
    allow: Sequence[str] = (),
    assets: str | os.PathLike[str] | None = None,
    spec: str | Sequence[str] = (),
    chunks: int = 1,
    model_parallel: int = 1,
    max_file_size: int | None = None,
    jobs: int | None = None,
    engine: Engine = "stream",
    trust: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
    """Converts a checkpoint; memory does not grow with it, and the result is whole or absent.

    Args:
        source: A safetensors directory or file, a ``torch.save`` file, a DCP directory, or a hub id
            (``org/name[@revision]``, ``hf://...``), which is downloaded into the hub's cache.
        target: Where the result goes.
        form: ``hf``, ``torch`` or ``dcp``; by default from the target's name (``*.pth``, ``*.pt``
            and ``*.bin`` are torch files), else ``hf`` for a DCP source and ``dcp`` otherwise.
        to: Naming of the result; by default ``hf`` for the hf form, else the source's own.
        from_: Naming of the source, where keys leave a choice.
        keymap: A table of your own, which ``to`` and ``from_`` may then name.
        root: Key that the weights sit under in a dcp or torch result; ``""`` for none.
        only: Take only what sits under this key (``model``), or keys that match this pattern.
        dtype: Cast floating-point tensors of two or more dims (``bf16``, ``fp16``, ``fp32``).
            Vectors, such as norm weights and biases, and integers keep their type.
        cast_all: Cast floating-point vectors and scalars too.
        dequantize: Multiply weights in scaled one-byte blocks (fp8) out, into bf16 or ``dtype``.
        allow: Features to leave out although the target cannot express them, by name;
            ``overflow`` allows a cast to produce infinities.
        assets: Directory with the config and tokenizer, where the source has none.
        spec: Numbers of the model that no file states, or states wrongly: ``heads=8,kv_heads=2``.
        chunks: Row chunks per tensor in a dcp result, as FSDP2 over as many ranks stores them.
        model_parallel: Files of a torch result ``to="meta"``, which is then a directory: every
            rank's share of each tensor, as Meta releases its larger models.
        max_file_size: Bytes of tensors per file at most, for hf and dcp results.
        jobs: Threads.
        engine: ``torch`` reads and writes with torch's own functions, the whole model in memory;
            for files that ours declines, and for comparison.
        trust: With ``engine="torch"``: unpickle without restrictions what the restricted unpickler
            refuses, which runs code that the file names.
        overwrite: Replace an existing target, in one step once the result is complete.
        dry_run: Do everything but write.
        progress: Called with the bytes done, from worker threads.

    Raises:
        CoverageError: Keys are missing, unknown or misshapen; all are listed.
        NotExpressibleError: The target naming cannot hold the model; all reasons are listed.
        FormatError: A file is truncated, malformed or unsafe.
        TargetExistsError: The target exists, or is being written.
        NoSpaceError: The disk cannot hold the result.
    """
    started = time.perf_counter()
    stated = parse_pairs([spec] if isinstance(spec, str) else spec)
    source, typed_target = locate(source), Path(target)
    if not dry_run:
        is_split = to == "meta" and model_parallel > 1
        is_file = not is_split and (form or default_form("hf", typed_target, to)) == "torch"
        check_target(typed_target, overwrite=overwrite, is_file=is_file, source=source)
    opened: AbstractContextManager[Catalog]
    by_torch = _by_torch(engine, trust=trust)
    if by_torch and dry_run:
        opened = nullcontext(_open_without_torch(source))
    elif by_torch:
        from dcpconv import torch_engine  # noqa: PLC0415 - imports torch

        own_form = torch_engine.form_of(source)
        wanted_form = form or default_form(own_form, typed_target, to)
        changes = (to, from_, keymap, root, only, dtype, assets, max_file_size)
        is_verbatim = chunks == 1 and not stated and all(change is None for change in changes)
        if is_verbatim and {own_form, wanted_form} == {"torch", "dcp"}:
            return torch_engine.convert_plain(
                source, typed_target, form=wanted_form, overwrite=overwrite, trust=trust
            )
        opened = torch_engine.rewritten(source, typed_target, overwrite=overwrite, trust=trust)
    else:
        opened = nullcontext(open_checkpoint(source))
    with opened as everything:
        catalog = select(everything, only)
        form = form or default_form(catalog.form, typed_target, to)
        own = read_keymap(Path(keymap)) if keymap else None
        model, spec_note = find_spec(catalog, assets)
        weights = recognise(
            catalog,
            spec=model,
            keymap=named_keymap(from_, own, model),
            root=_source_root(root, form, catalog),
        )
        model, settled = settled_spec(weights, model, stated)
        wanted = _target_keymap(to, own, weights, model, form)
        weights, model = without_idle(weights, model, wanted)
        if dequantize:
            wanted = wanted or weights.require_keymap()
        job = Job(
            catalog=catalog,
            weights=weights,
            wanted=wanted,
            spec=model,
            form=form,
            target=typed_target,
            assets=Path(assets) if assets else None,
            root=root,
            dtype=_dtype(dtype),
            cast_all=cast_all,
            allow=tuple(allow),
            ranks=model_parallel if form == "torch" and to == "meta" else 1,
            dequantize=dequantize,
        )
        if job.renames and model is None and spec_note:
            read_spec(source)  # raises: another naming needs what the config says
        coverage, notes = job.cover()
        coverage.require(source, hint=_coverage_hint(coverage, model, assets))
        tensors = make_plan(
            coverage,
            path_of=job.path_of,
            regions=(lambda shape: row_chunks(shape, chunks)) if form == "dcp" else whole,
            dtype_of=job.dtype_of,
        )
        planned = tensors
        if job.ranks > 1:
            shares = splitting.shares(
                coverage,
                job.ranks,
                spec=model,
                path_of=job.path_of,
                dtype_of=job.dtype_of,
            )
            planned = tuple(chain.from_iterable(shares))
            outline = splitting.outline(shares, modulus=block_size(typed_target))
        else:
            outline = job.outline(tensors, max_file_size=max_file_size)
        side = job.side_files(coverage, tensors)
        if dequantize:
            side = dequantized(side, most_used(tensors))
        notes = (*catalog.notes, *spec_note, *settled, *notes, *side.notes, *job.notes(coverage))
        report = summarise(job, coverage, tensors, outline, side, notes)
        if dry_run:
            return report
        moved = _write(
            outline, planned, side, job, jobs=jobs, overwrite=overwrite, progress=progress
        )
        return replace(
            report,
            moved={
                name: nbytes
                for name in ("reflinked", "copied", "buffered", "relabelled", "cast", "holes")
                if (nbytes := getattr(moved, name))
            },
            lossy=lossy_casts(moved, tensors, outline),
            seconds=time.perf_counter() - started,
            is_dry_run=False,
        )


def _by_torch(engine: str, *, trust: bool) -> bool:
    if engine not in {"stream", "torch"}:
        raise DcpconvError(f"there is no engine {engine!r}", [("expected", "stream or torch")])
    if trust and engine != "torch":
        raise DcpconvError(
            "only torch itself can be told to trust a file; the streaming engine runs nothing",
            hint="pass --engine torch --trust, if you trust whoever wrote the file",
        )
    return engine == "torch"


def _open_without_torch(source: Path) -> Catalog:
    try:
        return open_checkpoint(source)
    except FormatError as error:
        hint = "leave --dry-run out: only torch reads this, and it can tell by converting alone"
        raise FormatError(error.headline, error.facts, hint=hint) from error


def default_form(source: Form, target: Path, to: str | None = None) -> Form:
    """The form that a target's name and the source suggest."""
    if target.suffix in {".pth", ".pt", ".bin"}:
        return "torch"
    family_is_hf = to is None or to == "hf" or to.startswith("hf-")
    return "hf" if source == "dcp" and family_is_hf else "dcp"


def _write(
    outline: Outline,
    tensors: tuple[OutTensor, ...],
    side: SideFiles,
    job: Job,
    *,
    jobs: int | None,
    overwrite: bool,
    progress: Callable[[Progress], None] | None,
) -> Moved:
    total = sum(fill.nbytes for file in outline.files for _, fill in file.payloads)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(Progress(done, total))

    with staging(
        job.target,
        overwrite=overwrite,
        is_file=job.is_one_file,
        source=job.catalog.source,
    ) as stage:
        check_space(
            job.target,
            disk_nbytes(outline, side),
            reflinkable=spared(outline, source=job.catalog.path, stage=stage.path),
        )
        try:
            moved = execute(
                outline,
                source=job.catalog.path,
                target=stage.path,
                jobs=jobs,
                progress=advance,
                labels=labels(tensors, outline),
                allow_overflow="overflow" in job.allow,
            )
        except LossyCastError as error:
            raise LossyCastError(
                "values are too large for the target type; nothing was written",
                error.facts,
                hint="choose bf16 or fp32; --allow overflow writes infinities instead",
            ) from error
        beside = [(file.name, file.read()) for file in side.files]
        stage.publish([*beside, *outline.commit])
    return moved


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


def _dtype(name: str | None) -> DType | None:
    if name is None:
        return None
    dtype = BY_LABEL.get(name) or BY_NAME.get(name.removeprefix("torch."))
    if dtype is None or not dtype.is_floating_point:
        floats = ", ".join(d.label for d in BY_LABEL.values() if d.is_floating_point)
        raise DcpconvError(f"cannot cast to {name!r}", [("expected", f"one of {floats}")])
    return dtype


def _coverage_hint(
    coverage: Coverage, spec: ModelSpec | None, assets: str | os.PathLike[str] | None
) -> str | None:
    if coverage.misshapen and spec is not None:
        return "the config does not describe these tensors; is it the right one?"
    if coverage.unknown and spec is None and assets is None:
        return "--assets DIR names a config; --keymap FILE adds keys to a table"
    return None
