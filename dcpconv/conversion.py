"""Converts a checkpoint of any form and naming into any other: catalog, plan, engine, publish."""

from __future__ import annotations

import fnmatch
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.catalog import Catalog, Form
from dcpconv.coverage import Coverage
from dcpconv.dtypes import BY_LABEL, BY_NAME, DType
from dcpconv.engine import Moved, execute
from dcpconv.errors import DcpconvError, FormatError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.job import Job, disk_nbytes
from dcpconv.keymaps import Keymap, read_keymap
from dcpconv.naming import find_spec, named_keymap, target_keymap
from dcpconv.outline import Outline, OutTensor
from dcpconv.plan import make_plan, row_chunks, whole
from dcpconv.publish import check_space, staging
from dcpconv.recognition import Weights, recognise
from dcpconv.report import ConversionReport, LossyCast, Relabelled, Side
from dcpconv.side_files import SideFiles
from dcpconv.spec import ModelSpec

AS_STORED = "as stored"


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
    allow: Sequence[str] = (),
    assets: str | os.PathLike[str] | None = None,
    chunks: int = 1,
    max_file_size: int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
    """Converts a checkpoint; memory does not grow with it, and the result is whole or absent.

    Args:
        source: A safetensors directory or file, a ``torch.save`` file, or a DCP directory.
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
        allow: Features to leave out although the target cannot express them, by name;
            ``overflow`` allows a cast to produce infinities.
        assets: Directory with the config and tokenizer, where the source has none.
        chunks: Row chunks per tensor in a dcp result, as FSDP2 over as many ranks stores them.
        max_file_size: Bytes of tensors per file at most, for hf and dcp results.
        jobs: Threads.
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
    source, typed_target = Path(source), Path(target)
    catalog = select(open_checkpoint(source), only)
    form = form or default_form(catalog, typed_target, to)
    own = read_keymap(Path(keymap)) if keymap else None
    spec, spec_note = find_spec(catalog, assets)
    weights = recognise(
        catalog,
        spec=spec,
        keymap=named_keymap(from_, own, spec),
        root=_source_root(root, form, to, catalog),
    )
    wanted = _target_keymap(to, own, weights, spec, form)
    job = Job(
        catalog=catalog,
        weights=weights,
        wanted=wanted,
        spec=spec,
        form=form,
        target=typed_target,
        assets=Path(assets) if assets else None,
        root=root,
        only=only,
        dtype=_dtype(dtype),
        cast_all=cast_all,
        allow=tuple(allow),
    )
    coverage, notes = job.cover()
    coverage.require(source, hint=_coverage_hint(coverage, spec, assets))
    tensors = make_plan(
        coverage,
        path_of=job.path_of,
        regions=(lambda shape: row_chunks(shape, chunks)) if form == "dcp" else whole,
        dtype_of=job.dtype_of,
    )
    outline = job.outline(tensors, max_file_size=max_file_size)
    side = job.side_files(coverage, tensors)
    notes = (*catalog.notes, *spec_note, *notes, *side.notes, *job.notes(coverage))
    report = _report(job, coverage, tensors, outline, side, notes)
    if dry_run:
        return report
    moved = _write(outline, tensors, side, job, jobs=jobs, overwrite=overwrite, progress=progress)
    return replace(
        report,
        moved={
            name: nbytes
            for name in ("reflinked", "copied", "buffered", "relabelled", "cast", "holes")
            if (nbytes := getattr(moved, name))
        },
        lossy=_lossy(moved, tensors, outline),
        seconds=time.perf_counter() - started,
        is_dry_run=False,
    )


def default_form(catalog: Catalog, target: Path, to: str | None = None) -> Form:
    """The form that a target's name and the source suggest."""
    if target.suffix in {".pth", ".pt", ".bin"}:
        return "torch"
    family_is_hf = to is None or to == "hf" or to.startswith("hf-")
    return "hf" if catalog.form == "dcp" and family_is_hf else "dcp"


def select(catalog: Catalog, only: str | None) -> Catalog:
    """The part of a checkpoint under one key, or whose keys match a shell pattern.

    Raises:
        FormatError: Nothing is there; says what is.
    """
    if only is None:
        return catalog
    keys = [*catalog.tensors, *catalog.objects]
    under = {key for key in keys if key == only or key.startswith(f"{only}.")}
    chosen = under or {key for key in keys if fnmatch.fnmatchcase(key, only)}
    if not chosen:
        tops = sorted({str(catalog.path_of(key)[0]) for key in keys})
        raise FormatError(
            f"nothing in the checkpoint is under {only!r} or matches it",
            [("source", catalog.source), ("found", ", ".join(tops[:12]))],
            hint="give a container such as model, or a pattern such as 'layers.0.*'",
        )
    return replace(
        catalog,
        tensors={key: entry for key, entry in catalog.tensors.items() if key in chosen},
        objects={key: value for key, value in catalog.objects.items() if key in chosen},
        tied={k: v for k, v in catalog.tied.items() if k in chosen and v in chosen},
    )


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
        is_file=job.form == "torch",
        source=job.catalog.source,
    ) as stage:
        check_space(job.target, disk_nbytes(outline, side))
        moved = execute(
            outline,
            source=job.catalog.path,
            target=stage.path,
            jobs=jobs,
            progress=advance,
            labels=_labels(tensors, outline),
            allow_overflow="overflow" in job.allow,
        )
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


def _source_root(root: str | None, form: Form, to: str | None, catalog: Catalog) -> str | None:
    """``--root`` names the container in the result; in an hf result there is none to name, so it
    then says where the weights of the source are."""
    del to
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


def _labels(tensors: Iterable[OutTensor], outline: Outline) -> dict[tuple[str, int], str]:
    """Key of the tensor behind every payload, for casts."""
    keys = {
        id(chunk.fill): tensor.key
        for tensor in tensors
        for chunk in tensor.chunks
        if chunk.fill.is_cast
    }
    if not keys:
        return {}
    return {
        (file.name, offset): keys[id(fill)]
        for file in outline.files
        for offset, fill in file.payloads
        if id(fill) in keys
    }


def _lossy(moved: Moved, tensors: Iterable[OutTensor], outline: Outline) -> tuple[LossyCast, ...]:
    labels = _labels(tensors, outline)
    found: dict[str, LossyCast] = {}
    for loss in moved.losses:
        key = labels[loss.file, loss.offset]
        known = found.get(key, LossyCast(key, 0, 0))
        found[key] = LossyCast(
            key, known.overflowed + loss.overflowed, known.underflowed + loss.underflowed
        )
    return tuple(found.values())


def _labels_by_bytes(nbytes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(nbytes, key=lambda label: -nbytes[label]))


def _report(
    job: Job,
    coverage: Coverage,
    tensors: tuple[OutTensor, ...],
    outline: Outline,
    side: SideFiles,
    notes: tuple[str, ...],
) -> ConversionReport:
    source_bytes: Counter[str] = Counter()
    for entry in job.catalog.tensors.values():
        source_bytes[entry.dtype.label] += entry.nbytes
    target_bytes: Counter[str] = Counter()
    for tensor in tensors:
        target_bytes[tensor.dtype.label] += sum(chunk.fill.nbytes for chunk in tensor.chunks)
    layouts = Counter(
        target.relabelled for target in coverage.targets if target.relabelled is not None
    )
    cast = sum(any(chunk.fill.is_cast for chunk in tensor.chunks) for tensor in tensors)
    family = job.weights.keymap.name if job.weights.keymap else AS_STORED
    return ConversionReport(
        source=Side(
            str(job.catalog.source),
            job.catalog.form,
            family,
            len(job.catalog.tensors),
            len(job.catalog.files),
            job.catalog.nbytes,
            _labels_by_bytes(source_bytes),
        ),
        target=Side(
            str(job.target),
            job.form,
            job.wanted.name if job.wanted else family,
            len(tensors),
            len(outline.files),
            sum(fill.nbytes for file in outline.files for _, fill in file.payloads),
            _labels_by_bytes(target_bytes),
        ),
        copied=len(tensors) - sum(layouts.values()) - cast,
        relabelled=tuple(
            Relabelled(source, target, count) for (source, target), count in layouts.items()
        ),
        cast=cast,
        lossy=(),
        tied=tuple((t.key, t.tied_to) for t in coverage.targets if t.tied_to is not None),
        ignored=tuple((fault.key, fault.why) for fault in coverage.ignored),
        left=() if job.keeps_nesting else job.weights.rest,
        allowed=job.allowed,
        side_files=tuple(file.name for file in side.files),
        notes=notes,
        moved={},
        disk_nbytes=disk_nbytes(outline, side),
        seconds=0.0,
        is_dry_run=True,
    )
