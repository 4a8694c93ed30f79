"""The report of one conversion, put together from what was planned and what was moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from dcpconv.conversion.job import Job
from dcpconv.conversion.report import ConversionReport, Relabelled, Side
from dcpconv.core.outline import Outline, OutTensor
from dcpconv.engine.execute import CastLoss, LossyCast
from dcpconv.families.side_files import SideFiles, disk_nbytes
from dcpconv.plan.coverage import AS_STORED, Coverage


def labels(tensors: Iterable[OutTensor], outline: Outline) -> dict[tuple[str, int], str]:
    """Key of the tensor behind every payload, for casts."""
    keys = {
        id(chunk.fill): tensor.key
        for tensor in tensors
        for chunk in tensor.chunks
        if chunk.fill.is_computed
    }
    if not keys:
        return {}
    return {
        (file.name, offset): keys[id(fill)]
        for file in outline.files
        for offset, fill in file.payloads
        if id(fill) in keys
    }


def lossy_casts(
    losses: Iterable[CastLoss], tensors: Iterable[OutTensor], outline: Outline
) -> tuple[LossyCast, ...]:
    """What casts changed by more than rounding, by tensor."""
    names = labels(tensors, outline)
    found: dict[str, LossyCast] = {}
    for loss in losses:
        key = names[loss.file, loss.offset]
        known = found.get(key, LossyCast(key, 0, 0))
        found[key] = LossyCast(
            key, known.overflowed + loss.overflowed, known.underflowed + loss.underflowed
        )
    return tuple(found.values())


def _labels_by_bytes(nbytes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(nbytes, key=lambda label: -nbytes[label]))


def summarise(
    job: Job,
    coverage: Coverage,
    tensors: tuple[OutTensor, ...],
    outline: Outline,
    side: SideFiles,
    notes: tuple[str, ...],
) -> ConversionReport:
    """The report before anything is moved."""
    source_bytes: Counter[str] = Counter()
    for entry in job.catalog.tensors.values():
        source_bytes[entry.dtype.label] += entry.nbytes
    target_bytes: Counter[str] = Counter()
    for tensor in tensors:
        target_bytes[tensor.dtype.label] += sum(chunk.fill.nbytes for chunk in tensor.chunks)
    layouts = Counter(
        target.relabelled for target in coverage.targets if target.relabelled is not None
    )
    cast = {t.path for t in tensors if any(chunk.fill.is_cast for chunk in t.chunks)}
    merged = {t.path for t in tensors if any(chunk.fill.changes for chunk in t.chunks)}
    relabelled = {job.path_of(target.key) for target in coverage.targets if target.relabelled}
    family = job.aim.weights.keymap.name if job.aim.weights.keymap else AS_STORED
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
            job.aim.table.name if job.aim.table else family,
            len(tensors),
            len(outline.files),
            sum(fill.nbytes for file in outline.files for _, fill in file.payloads),
            _labels_by_bytes(target_bytes),
        ),
        copied=len({tensor.path for tensor in tensors} - cast - relabelled - merged),
        relabelled=tuple(
            Relabelled(source, target, count) for (source, target), count in layouts.items()
        ),
        cast=len(cast),
        lossy=(),
        tied=tuple((t.key, t.tied_to) for t in coverage.targets if t.tied_to is not None),
        ignored=tuple((fault.key, fault.why) for fault in coverage.ignored),
        left=() if job.keeps_nesting else job.aim.weights.rest,
        allowed=job.aim.allowed,
        side_files=tuple(file.name for file in side.files),
        notes=notes,
        moved={},
        disk_nbytes=disk_nbytes(outline, side),
        seconds=0.0,
        is_dry_run=True,
        merged=len(merged),
    )
