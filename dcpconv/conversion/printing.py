"""The fingerprint of what a conversion has written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dcpconv.conversion.job import Job
from dcpconv.plan.fingerprints import fingerprint_of
from dcpconv.plan.manifests import manifest_beside
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import understand


def printed_result(job: Job, *, jobs: int | None) -> dict[str, Any]:
    """Reads the result as it lies on disk; a directory gets its manifest.

    Args:
        job: What was converted into what: the naming and the numbers of the result, which no file
            beside it may say.
        jobs: Threads.

    Returns:
        Fields of the report.
    """
    going = job.aim
    table = going.table if going.table is not None else going.weights.keymap
    said = going.source.said
    name = table.name if table is not None else None
    result = understand(job.target, Said(from_=name, keymap=said.keymap))
    if table is not None and going.spec is not None:
        result = replace(result, spec=going.spec)
    found = fingerprint_of(result, jobs=jobs)
    if not job.is_one_file:
        found.write(manifest_beside(job.target))
    return {"fingerprint": found.digest, "fingerprint_nbytes": found.nbytes}
