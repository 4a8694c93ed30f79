"""The fingerprint of what a conversion writes, taken while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.conversion.job import Job
from dcpconv.conversion.report import ConversionReport
from dcpconv.core.catalog import Catalog, Chunk, Extent, TensorEntry
from dcpconv.core.outline import Outline, OutTensor
from dcpconv.engine.hashing import finished
from dcpconv.engine.manifests import MANIFEST, manifest_beside, manifest_of_file
from dcpconv.engine.passing import PassingDigests
from dcpconv.plan.canonical import Canonical, canonical
from dcpconv.plan.fingerprints import Fingerprint, fills_of, fingerprint_of, made_of
from dcpconv.sources.opening import End
from dcpconv.sources.recognition import Weights, recognise
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import Source, understand
from dcpconv.stores.local import Sources


@dataclass(slots=True)
class ResultDigests:
    """The tensors of a result that is still to be written, and what takes their digests.

    Attributes:
        source: The result as it will be understood.
        known: Its tensors without their naming, those that may be one counted as two.
        passing: Takes the bytes.
        fingerprint: Once all is written.
    """

    source: Source
    known: Canonical
    passing: PassingDigests
    fingerprint: Fingerprint | None = None

    def finish(self, place: Path, *, jobs: int | None) -> tuple[str, bytes]:
        """Make the fingerprint, once all is written; what passed through no buffer is read.

        Args:
            place: The directory that holds the files now.
            jobs: Threads.

        Returns:
            The manifest, as a file to stand beside the weights.

        Raises:
            FormatError: A file is missing, unreadable or too short.
        """
        with Sources(place) as sources:
            digests = finished(self.passing, sources=sources, jobs=jobs)
        targets = self.known.targets
        by_name = dict(zip((target.key for target in targets), digests, strict=True))
        by_entry = {target.pieces[0].entry.key: by_name[target.key] for target in targets}

        def differing(weights: Weights, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
            entries = weights.entries
            return [
                (key, owner)
                for key, owner in pairs
                if by_entry.get(entries[key].key) != by_entry.get(entries[owner].key)
            ]

        known = canonical(self.source, differing=differing)
        found = [by_name[target.key] for target in known.targets]
        self.fingerprint = made_of(self.source, known, found)
        lines = "".join(f"{line}\n" for line in self.fingerprint.manifest())
        return self.beside, lines.encode()

    @property
    def beside(self) -> str:
        """Name of the manifest, as a file to stand beside the weights."""
        catalog = self.source.catalog
        is_directory = catalog.path == catalog.source
        return MANIFEST if is_directory else manifest_of_file(catalog.source).name


def planned_digests(
    job: Job, tensors: Sequence[OutTensor], outline: Outline
) -> ResultDigests | None:
    """What takes the digests of a result; ``None`` where it has to be read once it is there,
    because several files hold shares of one tensor.

    Args:
        job: What is converted into what: the naming and the numbers of the result, which no file
            beside it may say.
        tensors: The plan: every tensor of the result.
        outline: Where every byte will be.

    Raises:
        AmbiguousFamilyError: Several namings fit and lead to different bytes.
        LayoutError: Elements change places, and neither config nor shapes say where to.
    """
    if job.wanted.ranks(job.form) != 1:
        return None
    catalog = _planned_catalog(job, tensors, outline)
    going = job.aim
    table = going.table if going.table is not None else going.weights.keymap
    weights = recognise(
        catalog,
        spec=going.spec,
        keymap=table,
        tables=() if table is None else None,
        own=going.source.said.keymap,
    )
    spec = going.spec if table is not None else None
    end = End(str(job.target), job.form, len(catalog.tensors), len(catalog.files))
    source = Source(catalog, weights, spec, None, Said(keymap=going.source.said.keymap), end)
    known = canonical(source, differing=lambda _, pairs: [*pairs])
    return ResultDigests(source, known, PassingDigests(fills_of(known)))


def with_print(
    report: ConversionReport, job: Job, digests: ResultDigests | None, *, jobs: int | None
) -> ConversionReport:
    """The report with the fingerprint of a result that is published.

    Args:
        report: What else there is to say.
        job: What was converted into what.
        digests: What took its digests; where nothing did, the result is read, and gets its
            manifest.
        jobs: Threads.
    """
    if digests is None:
        found = _read(job, jobs=jobs)
        found.write(manifest_beside(job.target))
        return replace(report, fingerprint=found.digest, fingerprint_nbytes=found.nbytes)
    notes = report.notes
    if digests.fingerprint is None:
        digests.finish(digests.source.catalog.path, jobs=jobs)
        command = f"dcpconv fingerprint {job.target} -o FILE"
        notes = (
            *notes,
            f"parts of the result were read back, too late for a manifest: `{command}`",
        )
    assert digests.fingerprint is not None  # noqa: S101
    return replace(
        report,
        fingerprint=digests.fingerprint.digest,
        fingerprint_nbytes=digests.passing.nbytes,
        notes=notes,
    )


def _read(job: Job, *, jobs: int | None) -> Fingerprint:
    """The fingerprint of a result as it lies on disk."""
    going = job.aim
    table = going.table if going.table is not None else going.weights.keymap
    said = going.source.said
    result = understand(job.target, Said(from_=table.name if table else None, keymap=said.keymap))
    if table is not None and going.spec is not None:
        result = replace(result, spec=going.spec)
    return fingerprint_of(result, jobs=jobs)


def _planned_catalog(job: Job, tensors: Sequence[OutTensor], outline: Outline) -> Catalog:
    """What opening the result will find."""
    places = {
        id(fill): Extent(file.name, offset, fill.nbytes)
        for file in outline.files
        for offset, fill in file.payloads
    }
    entries: dict[str, TensorEntry] = {}
    tied: dict[str, str] = {}
    for tensor in tensors:
        chunks = tuple(
            Chunk(chunk.offsets, chunk.sizes, places[id(chunk.fill)])
            for chunk in tensor.chunks
            if id(chunk.fill) in places
        )
        if not chunks and tensor.tied_to is not None:
            chunks = tuple(entries[tensor.tied_to].chunks)
            tied[tensor.key] = tensor.tied_to
        entries[tensor.key] = TensorEntry(tensor.key, tensor.dtype, tensor.shape, chunks)
    return Catalog(
        job.form,
        job.target.parent if job.is_one_file else job.target,
        job.target,
        {file.name: file.nbytes for file in outline.files},
        entries,
        paths={tensor.key: tensor.path for tensor in tensors},
        tied=tied,
    )
