"""One result, written by many processes: rank 0 decides and publishes, all of them write."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcpconv.conversion.deciding import Decided
from dcpconv.conversion.report import RankShare
from dcpconv.conversion.request import guarded
from dcpconv.conversion.summary import labels
from dcpconv.conversion.worlds import watching
from dcpconv.conversion.worlds.faults import to_record
from dcpconv.conversion.worlds.look import compare, look_of
from dcpconv.conversion.worlds.meeting import (
    Meeting,
    State,
    forget_others,
    set_up,
    write_record,
)
from dcpconv.conversion.worlds.planning import (
    Plan,
    length_of,
    prepare,
    require_same_number,
    unfinished,
    wait_for_plan,
)
from dcpconv.conversion.worlds.seats import RankError, Seat, host
from dcpconv.conversion.worlds.watching import Watch
from dcpconv.core.errors import DcpconvError
from dcpconv.core.outline import Outline
from dcpconv.engine import cutting
from dcpconv.engine.copying import write_error
from dcpconv.engine.cutting import OutPiece
from dcpconv.engine.execute import CastLoss, Moved, execute, refuse_overflow, together
from dcpconv.engine.publish import RESULT, SHARES, staging, staging_directory


@dataclass(frozen=True, slots=True)
class SharedResult:
    """What all ranks did.

    Attributes:
        moved: Bytes by how they got there.
        shares: What each rank wrote.
        resumed: Payload bytes that an earlier run had written.
        notes: What else a user should know.
    """

    moved: Moved
    shares: tuple[RankShare, ...]
    resumed: int
    notes: tuple[str, ...]


def write_shared(
    decided: Decided,
    seat: Seat,
    *,
    jobs: int | None,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> SharedResult:
    """Write this rank's share of a result; all ranks return, or raise, when all of it has ended.

    Args:
        decided: The conversion, decided by this rank as by every other.
        seat: Which rank this is.
        jobs: Threads of this rank.
        overwrite: Replace an existing target.
        progress: Called on rank 0 with payload bytes done, and all there are.

    Raises:
        RankError: The ranks do not agree, or one of them is gone.
        SourceChangedError: The source looks different to another rank.
        DcpconvError: What one process raises; in all ranks where one of them fails.
    """
    if seat.rank:
        return _follow(decided, seat, jobs=jobs)
    return _lead(decided, seat, jobs=jobs, overwrite=overwrite, progress=progress)


def _lead(
    decided: Decided,
    seat: Seat,
    *,
    jobs: int | None,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> SharedResult:
    job, outline = decided.job, decided.outline
    look = look_of(decided)
    with staging(
        job.target,
        overwrite=overwrite,
        is_file=job.is_one_file,
        source=guarded(job.catalog.source, job.target, job.catalog.files),
        goes_on=lambda root: unfinished(root / SHARES, look) is not None,
    ) as stage:
        path = stage.path.parent / SHARES
        with _writing(path):
            set_up(path, seat.size)
            plan = prepare(decided, stage, look, seat)
        pieces = plan.pieces(outline)
        resumed = sum(pieces[index].payload for index in plan.done)
        total = sum(piece.payload for piece in pieces)
        meeting = Meeting(path, seat, plan.token)
        meeting.take_seat()
        try:
            with Watch(meeting, progress=lambda nbytes: progress(resumed + nbytes, total)) as watch:
                with _writing(path):
                    write_record(path / "plan", asdict(plan))
                    forget_others(path, plan.token)
                mine, share = _work(decided, plan, pieces, stage.path, watch, jobs=jobs)
                ends = watch.wait_for_all()
                written = _added_up(decided, plan, [mine, *(end["moved"] for end in ends)])
                shares = [share, *(end["share"] for end in ends)]
                _require_sizes(outline, stage.path)
                beside = [(file.name, file.read()) for file in decided.side.files]
                # What lies in the staging directory after the rename may be the old target.
                (path / "plan").unlink()
                stage.publish([*beside, *outline.commit])
        except BaseException as error:
            record = to_record(error, rank=seat.rank, host=host())
            stage.keeping = record["keep"] and (path / "plan").exists()
            _end(meeting, "failed", record)
            raise
        notes = (_WHOLE,) if plan.whole else ()
        verdict = {"moved": asdict(written), "shares": shares, "resumed": resumed, "notes": notes}
        _end(meeting, "published", verdict)
        return _told(verdict)


_WHOLE = (
    "files on this file system are written by one process or not at all: each rank wrote whole ones"
)


def _end(meeting: Meeting, state: State, record: dict[str, Any]) -> None:
    """Tell the others how it ended, and wait until they know."""
    with suppress(OSError):
        meeting.end(state, record)
        watching.wait_for_farewell(meeting)


def _follow(decided: Decided, seat: Seat, *, jobs: int | None) -> SharedResult:
    path = staging_directory(decided.job.target) / SHARES
    plan = wait_for_plan(path, seat)
    meeting = Meeting(path, seat, plan.token)
    try:
        require_same_number(plan, seat)
        meeting.take_seat()
    except RankError as error:
        with suppress(OSError):
            meeting.refuse(to_record(error, rank=seat.rank, host=host()))
        raise
    watch = Watch(meeting, progress=lambda _: None)
    try:
        with watch:
            source = decided.job.catalog.source
            look = look_of(decided)
            compare(plan.look, look, source=source, rank=seat.rank, host=host())
            pieces = plan.pieces(decided.outline)
            mine, share = _work(decided, plan, pieces, path.parent / RESULT, watch, jobs=jobs)
            with _writing(path):
                meeting.end("done", {"moved": mine, "share": share})
            verdict = watch.wait_for_verdict()
    except BaseException as error:
        with suppress(OSError):
            if error is watch.fault:
                meeting.beat("left")
            else:
                meeting.end("failed", to_record(error, rank=seat.rank, host=host()))
        raise
    with suppress(OSError):
        meeting.beat("left")
    return _told(verdict)


def _work(
    decided: Decided,
    plan: Plan,
    pieces: tuple[OutPiece, ...],
    result: Path,
    watch: Watch,
    *,
    jobs: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write this rank's pieces; returns what it moved, and its row of the report."""
    outline, catalog, seat = decided.outline, decided.job.catalog, watch.meeting.seat
    begun = time.perf_counter()
    some: list[Moved] = []
    with _opened(result) as fd:
        mine = plan.share(pieces, seat.rank)
        for indices, stints in cutting.steps(outline, pieces, mine, nbytes=cutting.STEP):
            watch.require_all_well()
            if plan.whole:
                for file, _ in stints:
                    (result / file.name).unlink(missing_ok=True)
            moved = execute(
                outline,
                source=catalog.path,
                target=result,
                identities=catalog.identities,
                jobs=jobs,
                progress=watch.advance,
                allow_overflow=True,
                stints=stints,
                made=None if plan.whole else fd,
            )
            watch.meeting.note_done({"pieces": indices, "moved": asdict(moved)})
            some.append(moved)
    share = RankShare(seat.rank, host(), watch.nbytes, time.perf_counter() - begun)
    return asdict(together(some, outline)), asdict(share)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What it means that the ranks cannot meet."""
    try:
        yield
    except DcpconvError:
        raise
    except OSError as error:
        raise write_error(error, path) from error


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


def _added_up(decided: Decided, plan: Plan, records: Iterable[dict[str, Any]]) -> Moved:
    """What all ranks moved, earlier runs included.

    Raises:
        LossyCastError: Casts overflowed.
    """
    moved = together(map(_moved, [*plan.before, *records]), decided.outline)
    if "overflow" not in decided.job.aim.source.said.allow:
        refuse_overflow(moved.losses, labels(decided.planned, decided.outline))
    return moved


def _moved(record: dict[str, Any]) -> Moved:
    losses = tuple(CastLoss(**loss) for loss in record["losses"])
    return Moved(**{**record, "losses": losses})


def _require_sizes(outline: Outline, result: Path) -> None:
    wrong = [
        ("file", f"{file.name}: {length_of(result / file.name):,} bytes, not {file.nbytes:,}")
        for file in outline.files
        if length_of(result / file.name) != file.nbytes
    ]
    if wrong:
        raise DcpconvError("files of the result are not as long as planned", wrong)


def _told(verdict: dict[str, Any]) -> SharedResult:
    return SharedResult(
        moved=_moved(verdict["moved"]),
        shares=tuple(RankShare(**share) for share in verdict["shares"]),
        resumed=verdict["resumed"],
        notes=tuple(verdict["notes"]),
    )
