"""One result, written by one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.conversion.deciding import Decided
from dcpconv.conversion.request import guarded
from dcpconv.conversion.summary import labels
from dcpconv.engine.execute import Moved, execute
from dcpconv.engine.publish import staging
from dcpconv.engine.space import check_space, spared
from dcpconv.families.side_files import disk_nbytes
from dcpconv.stores.schemes import is_remote

if TYPE_CHECKING:
    from dcpconv.conversion.printing import ResultDigests
    from dcpconv.engine.placing import Ground
    from dcpconv.engine.uploading import Uploads


def write_alone(
    decided: Decided,
    ground: Ground | None,
    *,
    jobs: int | None,
    progress: Callable[[int, int], None],
    digests: ResultDigests | None = None,
) -> Moved:
    """Carries the plan out, and makes the result visible once it is whole.

    Args:
        decided: The plan.
        ground: What is at a target in a store; ``None`` where the target is a path.
        jobs: Threads.
        progress: Called with payload bytes done, and all there are.
        digests: Take what is written; a manifest of them is published with it.
    """
    job, outline, side = decided.job, decided.outline, decided.side
    total = sum(fill.nbytes for file in outline.files for _, fill in file.payloads)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    def carry_out(target: Path, uploads: Uploads | None = None) -> Moved:
        return execute(
            outline,
            source=job.catalog.path,
            target=target,
            identities=job.catalog.identities,
            jobs=jobs,
            progress=advance,
            labels=labels(decided.planned, outline),
            allow_overflow="overflow" in job.aim.source.said.allow,
            uploads=uploads,
            digests=digests.passing if digests is not None else None,
        )

    def commit(place: Path | None) -> list[tuple[str, bytes]]:
        """What is written last; of what nobody can read yet there is a manifest only if no byte of
        it has to be read."""
        manifest: list[tuple[str, bytes]] = []
        if digests is not None and (place is not None or digests.passing.is_whole):
            manifest = [digests.finish(place or job.target, jobs=jobs)]
        return [*manifest, *((file.name, file.read()) for file in side.files), *outline.commit]

    if ground is not None:
        from dcpconv.engine.placing import placing  # noqa: PLC0415 - most targets are paths

        with placing(
            ground,
            outline,
            is_file=job.is_one_file,
            beside=[*(file.name for file in side.files), *([digests.beside] if digests else ())],
        ) as placed:
            moved = carry_out(placed.path, placed.uploads)
            placed.publish(commit(None))
        return moved
    with staging(
        job.target,
        overwrite=job.wanted.overwrite,
        is_file=job.is_one_file,
        source=guarded(job.catalog.source, job.target, job.catalog.files),
    ) as stage:
        check_space(
            job.target,
            disk_nbytes(outline, side),
            reflinkable=0
            if is_remote(job.catalog.path)
            else spared(outline, source=job.catalog.path, stage=stage.path),
        )
        moved = carry_out(stage.path)
        stage.publish(commit(stage.path))
    return moved
