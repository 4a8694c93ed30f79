"""The coordinator's part: plan the result, make its files, and publish it once all is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.planner import SavePlan

from dcpconv.conversion.deciding import Decided, decide
from dcpconv.conversion.printing import ResultDigests, planned_digests, with_print
from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.request import Request
from dcpconv.conversion.saving.held import Held, Tie, held_by
from dcpconv.conversion.saving.shares import Share, literals_of, share_out
from dcpconv.conversion.summary import labels, lossy_casts
from dcpconv.core.errors import DcpconvError, FormatError, LossyCastError
from dcpconv.core.outline import Outline
from dcpconv.engine.copying import OutDirectory, reserve, write, write_error
from dcpconv.engine.execute import CastLoss, refuse_overflow, summed
from dcpconv.engine.publish import Staging, staging
from dcpconv.engine.space import check_space, writes_anywhere
from dcpconv.families.side_files import disk_nbytes
from dcpconv.sources.understanding import understand
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.schemes import target_of

if TYPE_CHECKING:
    from dcpconv.engine.placing import Ground, Placing
    from dcpconv.engine.uploading import Uploads


@dataclass
class Stage:
    """A result on its way.

    Attributes:
        decided: What it is.
        ties: Items that have to be equal for it to be right.
        place: Where it is before it is published.
        stack: Holds the place; closing it removes what was not published.
        by_file: Whether every file is written by one rank, from its first byte to its last.
        digests: What makes the manifest, where there is to be one.
    """

    decided: Decided
    ties: tuple[Tie, ...]
    place: Staging | Placing
    stack: ExitStack
    by_file: bool
    digests: ResultDigests | None = None

    @property
    def uploads(self) -> Uploads | None:
        """What makes objects of the coordinator's files, where the result goes into a store."""
        return None if isinstance(self.place, Staging) else self.place.uploads

    def all_have_ended(self) -> None:
        """No rank writes any more."""
        if not isinstance(self.place, Staging):
            self.place.others_have_ended()

    def shares(self, ranks: int) -> list[Share]:
        """What every rank writes."""
        return share_out(
            self.decided.outline,
            self.ties,
            ranks=ranks,
            directory=self.place.path,
            report=self.decided.report,
            by_file=self.by_file,
            by_first=not isinstance(self.place, Staging) and self.place.is_of_one_process,
        )

    def publish(self, found: Iterable[CastLoss], *, seconds: float) -> ConversionReport:
        """Make the result visible, if no cast overflowed.

        Args:
            found: What casts lost, of all ranks.
            seconds: What the save has taken.

        Raises:
            LossyCastError: One did, and the user did not allow that.
        """
        decided = self.decided
        losses = summed(found, decided.outline)
        if "overflow" not in decided.job.aim.source.said.allow:
            try:
                refuse_overflow(losses, labels(decided.planned, decided.outline))
            except LossyCastError as error:
                raise LossyCastError(
                    "values are too large for the target type; nothing was saved",
                    error.facts,
                    hint='choose bf16 or fp32; allow=["overflow"] writes infinities instead',
                ) from error
        beside = [(file.name, file.read()) for file in decided.side.files]
        report = decided.report
        if not isinstance(self.place, Staging):
            self.place.require_lengths(decided.outline)
        if self.digests is not None:
            beside.append(self.digests.finish(self.place.path, jobs=None))
            report = with_print(report, decided.job, self.digests, jobs=None)
        self.place.publish([*beside, *decided.outline.commit])
        return replace(
            report,
            lossy=lossy_casts(losses, decided.tensors, decided.outline),
            seconds=seconds,
            is_dry_run=False,
        )


def stage(plans: Sequence[SavePlan], request: Request, *, whole_files: bool | None = None) -> Stage:
    """Plan a result from what the ranks hold, and make its files, unless ranks write whole ones.

    Args:
        plans: By rank.
        request: What the user asked for.
        whole_files: Whether they do; by default only where the file system wants it.

    Raises:
        CoverageError: Keys are missing, unknown or misshapen; all are listed.
        NotExpressibleError: The target naming cannot hold the model; all reasons are listed.
        TargetExistsError: The target exists, or is being written.
        NoSpaceError: The disk cannot hold the result.
        StoreError: The store cannot be read, or is not written to.
    """
    ground = None
    target = target_of(request.wanted.path)
    if isinstance(target, RemotePath):
        request = replace(request, wanted=replace(request.wanted, path=target))
        request.wanted.require_disk_for_manifest()
        ground = request.check_target()
    if ground is not None:
        request = replace(request, wanted=replace(request.wanted, stem=ground.stem))
    held, ties = _tied(held_by(plans), request)
    decided = decide(held.catalog, request)
    if decided.job.keeps_nesting and held.catalog.objects:
        raise FormatError(
            "values that are no tensors are not written from ranks",
            [("key", key) for key in list(held.catalog.objects)[:8]],
            hint='only="model" leaves them out; torch saves them in a DCP of its own',
        )
    with ExitStack() as stack:
        if ground is not None:
            placed = stack.enter_context(_placed(ground, decided, ranks=len(plans)))
            if placed.is_of_one_process and len(plans) > 1:
                decided = _noting(decided, "the store takes this result from one process: rank 0")
            return Stage(decided, ties, placed, stack.pop_all(), by_file=True)
        place = stack.enter_context(
            staging(
                request.wanted.path,
                overwrite=request.wanted.overwrite,
                is_file=decided.job.is_one_file,
            )
        )
        check_space(request.wanted.path, disk_nbytes(decided.outline, decided.side))
        by_file = whole_files
        if by_file is None and not writes_anywhere(place.path):
            by_file = True
            note = "the file system takes no bytes in any order: every file was written by one rank"
            decided = _noting(decided, note)
        if not by_file:
            _make_files(place.path, decided.outline)
        digests = None
        if request.wanted.fingerprint:
            digests = planned_digests(decided.job, decided.tensors, decided.outline)
        return Stage(decided, ties, place, stack.pop_all(), bool(by_file), digests)


def _noting(decided: Decided, note: str) -> Decided:
    report = replace(decided.report, notes=(*decided.report.notes, note))
    return replace(decided, report=report)


@contextmanager
def _placed(ground: Ground, decided: Decided, *, ranks: int) -> Iterator[Placing]:
    """A place in a store."""
    from dcpconv.engine.placing import placing  # noqa: PLC0415 - most targets are paths

    beside = [file.name for file in decided.side.files]
    is_file = decided.job.is_one_file
    with placing(ground, decided.outline, is_file=is_file, beside=beside) as placed:
        if ranks > 1 and not placed.is_of_one_process:
            placed.share(decided.outline)
        yield placed


def _tied(held: Held, request: Request) -> tuple[Held, tuple[Tie, ...]]:
    """What the config says is one tensor under two names; the ranks look whether it is."""
    source = understand(request.source, request.said, only=request.only, catalog=held.catalog)
    if source.spec is None or not source.spec.tied or source.keymap is None:
        return held, ()
    entries = source.weights.entries
    return held.with_ties(
        (entries[second].key, entries[owner].key)
        for second, owner in source.keymap.tie_pairs().items()
        if second in entries and owner in entries
    )


def _make_files(directory: Path, outline: Outline) -> None:
    """Every file, as long as it will be, with what no rank holds."""
    target = OutDirectory(directory)
    fds: dict[str, int] = {}
    name = ""
    try:
        for file in outline.files:
            name = file.name
            fds[name] = target.make(name, file.nbytes)
            reserve(fds[name], 0, file.nbytes)  # blocks found one by one cost each write time
        for name, offset, data in literals_of(outline):
            write(fds[name], data, offset)
    except OSError as error:
        if isinstance(error, DcpconvError):
            raise
        raise write_error(error, directory / name) from error
    finally:
        for fd in fds.values():
            os.close(fd)
