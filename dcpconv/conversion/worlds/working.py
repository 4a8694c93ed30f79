"""One result, written by many processes: rank 0 decides, all of them write, one publishes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpconv.conversion.deciding import Decided
from dcpconv.conversion.report import RankShare
from dcpconv.conversion.request import guarded
from dcpconv.conversion.worlds.leading import Lead, writing
from dcpconv.conversion.worlds.look import look_of
from dcpconv.conversion.worlds.planning import (
    Plan,
    is_led_by_another,
    prepare,
    require_same_number,
    unfinished,
    wait_for_plan,
)
from dcpconv.conversion.worlds.results import SharedResult
from dcpconv.engine import cutting
from dcpconv.engine.copying import write_error
from dcpconv.engine.cutting import OutPiece
from dcpconv.engine.execute import Moved, execute, together
from dcpconv.engine.publish import RESULT, SHARES, staging, staging_directory
from dcpconv.engine.worlds.early import this_start
from dcpconv.engine.worlds.faults import is_told, to_record
from dcpconv.engine.worlds.look import compare
from dcpconv.engine.worlds.meeting import Meeting, forget_others, set_up, write_record
from dcpconv.engine.worlds.seats import RankError, Seat, host
from dcpconv.engine.worlds.watching import Watch

if TYPE_CHECKING:
    from dcpconv.conversion.printing import ResultDigests


def write_shared(
    decided: Decided,
    seat: Seat,
    *,
    jobs: int | None,
    progress: Callable[[int, int], None],
    digests: ResultDigests | None = None,
) -> SharedResult:
    """Write this rank's share of a result; all ranks return, or raise, when all of it has ended.

    Where a fingerprint is asked for, what was written is read back, and compared before it is
    published.

    Args:
        decided: The conversion, decided by this rank as by every other.
        seat: Which rank this is.
        jobs: Threads of this rank.
        progress: Called on rank 0 with payload bytes done, and all there are.
        digests: Take what the rank that publishes reads; a manifest of them is published with it.

    Raises:
        RankError: The ranks do not agree, or one of them is gone.
        SourceChangedError: The source looks different to another rank.
        DcpconvError: What one process raises; in all ranks where one of them fails.
    """
    path = staging_directory(decided.job.target) / SHARES
    if seat.rank or is_led_by_another(path, seat):
        return _follow(decided, seat, jobs=jobs, digests=digests)
    return _lead(decided, seat, jobs=jobs, progress=progress, digests=digests)


def _lead(
    decided: Decided,
    seat: Seat,
    *,
    jobs: int | None,
    progress: Callable[[int, int], None],
    digests: ResultDigests | None,
) -> SharedResult:
    job = decided.job
    look = look_of(decided)
    with staging(
        job.target,
        overwrite=job.wanted.overwrite,
        is_file=job.is_one_file,
        source=guarded(job.catalog.source, job.target, job.catalog.files),
        goes_on=lambda root: unfinished(root / SHARES, look) is not None,
    ) as stage:
        path = stage.path.parent / SHARES
        with writing(path):
            set_up(path, seat.size)
            plan = prepare(decided, stage, look, seat)
            meeting = Meeting(path, seat, plan.token, leads=True)
            meeting.take_seat()
            write_record(path / "plan", asdict(plan))
            forget_others(path, plan.token)
        lead = Lead(decided, plan, meeting, stage=stage, digests=digests)
        return _take_part(lead, jobs=jobs, progress=progress)


def _follow(
    decided: Decided, seat: Seat, *, jobs: int | None, digests: ResultDigests | None
) -> SharedResult:
    path = staging_directory(decided.job.target) / SHARES
    plan = wait_for_plan(path, seat)
    meeting = Meeting(path, seat, plan.token)
    try:
        require_same_number(plan, seat)
        if is_done := meeting.is_done:
            meeting.beat("done")
        else:
            meeting.take_seat()
    except RankError as error:
        with suppress(OSError):
            meeting.refuse(to_record(error, rank=seat.rank, host=host()))
        raise
    finally:
        this_start().has_met = True
    lead = Lead(decided, plan, meeting, stage=None, digests=digests)
    try:
        return _take_part(lead, jobs=jobs, progress=lambda *_: None, is_done=is_done)
    finally:
        lead.close()


def _take_part(
    lead: Lead,
    *,
    jobs: int | None,
    progress: Callable[[int, int], None],
    is_done: bool = False,
) -> SharedResult:
    """Write this rank's share, and publish where it leads once all have written theirs."""
    decided, plan, meeting = lead.decided, lead.plan, lead.meeting
    pieces = plan.pieces(decided.outline)
    resumed = sum(pieces[index].payload for index in plan.done)
    total = sum(piece.payload for piece in pieces)
    watch = Watch(
        meeting,
        progress=lambda nbytes: progress(resumed + nbytes, total),
        succeed=lead.succeed if lead.may_pass else None,
    )
    try:
        with watch:
            if lead.stage is None:
                source, rank = decided.job.catalog.source, meeting.seat.rank
                compare(plan.look, look_of(decided), source=source, rank=rank, host=host())
            if not is_done:
                result = meeting.path.parent / RESULT
                mine = _work(decided, plan, pieces, result, watch, jobs=jobs)
                with writing(meeting.path):
                    meeting.end("done", mine)
            is_done = True
            verdict = watch.wait() or lead.publish(jobs=jobs)
    except BaseException as error:
        if watch.leads:
            lead.fail(error, is_done=is_done)
            raise
        with suppress(OSError):
            if error is watch.fault or (is_done and lead.may_pass and is_told(error)):
                meeting.beat("left")
            else:
                meeting.end("failed", to_record(error, rank=meeting.seat.rank, host=host()))
        raise
    if not watch.leads:
        with suppress(OSError):
            meeting.beat("left")
    return SharedResult.of(verdict)


def _work(
    decided: Decided,
    plan: Plan,
    pieces: tuple[OutPiece, ...],
    result: Path,
    watch: Watch,
    *,
    jobs: int | None,
) -> dict[str, Any]:
    """Write this rank's pieces; returns what it moved, its row of the report, and digests."""
    outline, job, seat = decided.outline, decided.job, watch.meeting.seat
    begun = time.perf_counter()
    some: list[Moved] = []
    taken: dict[str, str] = {}
    with _opened(result) as fd:
        mine = plan.share(pieces, seat.rank)
        for indices, stints in cutting.steps(outline, pieces, mine, nbytes=cutting.STEP):
            watch.require_all_well()
            if plan.whole:
                for file, _ in stints:
                    (result / file.name).unlink(missing_ok=True)
            moved = execute(
                outline,
                source=job.catalog.path,
                target=result,
                identities=job.catalog.identities,
                jobs=jobs,
                progress=watch.advance,
                allow_overflow=True,
                stints=stints,
                made=None if plan.whole else fd,
            )
            digests: dict[str, str] = {}
            if job.wanted.fingerprint:
                from dcpconv.conversion.worlds import reading_back  # noqa: PLC0415 - few ask

                digests = reading_back.digests_of(outline, pieces, indices, fd)
            note = {"pieces": indices, "moved": asdict(moved), "digests": digests}
            watch.meeting.note_done(note)
            taken |= digests
            some.append(moved)
    share = RankShare(seat.rank, host(), watch.nbytes, time.perf_counter() - begun)
    return {"moved": asdict(together(some, outline)), "share": asdict(share), "digests": taken}


@contextmanager
def _opened(result: Path) -> Iterator[int]:
    try:
        fd = os.open(result, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise write_error(error, result) from error
    try:
        yield fd
    finally:
        os.close(fd)
