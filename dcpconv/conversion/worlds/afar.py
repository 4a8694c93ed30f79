"""One result in a store, written by many processes: whole objects each, and the commit by rank 0.

Rank 0 looks at the target and says under which names data goes there, before anybody plans.  What
is one object, or one commit, comes from rank 0 alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from dcpconv.conversion.deciding import Decided
from dcpconv.conversion.report import RankShare
from dcpconv.conversion.worlds.look import look_of
from dcpconv.conversion.worlds.results import SharedResult, added_up
from dcpconv.engine import cutting
from dcpconv.engine.execute import execute
from dcpconv.engine.placing import Ground, placing
from dcpconv.engine.uploading import Uploads
from dcpconv.engine.worlds import watching
from dcpconv.engine.worlds.faults import GoneRankError, from_record, to_record
from dcpconv.engine.worlds.look import compare
from dcpconv.engine.worlds.meeting import Meeting, State
from dcpconv.engine.worlds.seats import RankError, Seat, host
from dcpconv.engine.worlds.torchrun import meet
from dcpconv.engine.worlds.watching import Watch
from dcpconv.stores.remote import RemotePath

_GROUND, _PLAN = "ground", "plan"
"""Names of what rank 0 says, in this order."""

_ALONE = "the store takes this result from one process: rank 0"


@dataclass(slots=True)
class Afar:
    """The processes of one conversion into a store, as one of them sees them.

    Attributes:
        meeting: Where they meet.
        target: Where the result goes.
        ground: What is there; on other ranks than the first only the names that data gets.
        has_begun: Whether the others hear of a failure by itself.
    """

    meeting: Meeting
    target: RemotePath
    ground: Ground = field(init=False)
    has_begun: bool = False

    def __post_init__(self) -> None:
        self.ground = Ground(self.target)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.meeting.seat.rank == 0

    def look(self, survey: Callable[[], Ground | None]) -> Ground:
        """What is at the target, as rank 0 sees it before anybody writes there.

        Raises:
            DcpconvError: The target must not be written, or rank 0 has not come.
        """
        if self.is_first:
            self.ground = survey() or self.ground
            self.meeting.put(_GROUND, {"stem": self.ground.stem})
        else:
            self.ground = Ground(self.target, stem=self._heard(_GROUND)["stem"])
        return self.ground

    def _heard(self, name: str) -> dict[str, Any]:
        """What rank 0 says."""
        deadline = time.monotonic() + watching.PATIENCE
        for _ in watching.pauses():
            record = self.meeting.get(name)
            if record is not None:
                if (failure := record.get("failure")) is not None:
                    raise from_record(failure)
                return record
            if time.monotonic() > deadline:
                raise GoneRankError(
                    "rank 0 has not come",
                    [("rank", self.meeting.seat.rank), ("waited", f"{watching.PATIENCE:.0f} s")],
                    hint=self.meeting.together,
                )
        raise AssertionError

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Says to the others what fails before bytes move."""
        try:
            yield
        except BaseException as error:
            if not self.has_begun:
                with suppress(OSError, RankError):
                    self._tell(self.record(error))
            raise

    def _tell(self, record: dict[str, Any]) -> None:
        if not self.is_first:
            self.meeting.refuse(record)
            self.meeting.beat("left")
            return
        for name in (_GROUND, _PLAN):
            if self.meeting.get(name) is None:
                self.meeting.put(name, {"failure": record})

    def record(self, error: BaseException) -> dict[str, Any]:
        """What the others raise where this rank fails."""
        rank, again = self.meeting.seat.rank, self.meeting.again
        return to_record(error, rank=rank, host=host(), again=again)

    def write(
        self,
        decided: Decided,
        *,
        jobs: int | None,
        progress: Callable[[int, int], None],
    ) -> SharedResult:
        """Write this rank's objects; all ranks return, or raise, when all of it has ended.

        Args:
            decided: The conversion, decided by this rank as by every other.
            jobs: Threads of this rank.
            progress: Called on rank 0 with payload bytes done, and all there are.

        Raises:
            RankError: The ranks do not agree, or one of them is gone.
            SourceChangedError: The source looks different to another rank.
            DcpconvError: What one process raises; in all ranks where one of them fails.
        """
        if self.is_first:
            return self._lead(decided, jobs=jobs, progress=progress)
        return self._follow(decided, jobs=jobs)

    def _lead(
        self, decided: Decided, *, jobs: int | None, progress: Callable[[int, int], None]
    ) -> SharedResult:
        meeting, outline, look = self.meeting, decided.outline, look_of(decided)
        beside = [(file.name, file.read()) for file in decided.side.files]
        total = sum(fill.nbytes for file in outline.files for _, fill in file.payloads)
        meeting.take_seat()
        names = [name for name, _ in beside]
        with placing(self.ground, outline, is_file=decided.job.is_one_file, beside=names) as placed:
            is_alone = placed.is_of_one_process
            if not is_alone:
                placed.share(outline)
            try:
                with self._watch(lambda nbytes: progress(nbytes, total)) as watch:
                    meeting.put(_PLAN, {"look": look, "alone": is_alone})
                    self.has_begun = True
                    mine, share = self._work(decided, placed.uploads, watch, jobs, alone=is_alone)
                    watch.wait()
                    ends = [meeting.end_of(rank) or {} for rank in range(1, meeting.seat.size)]
                    written = added_up(decided, [mine, *(end["moved"] for end in ends)])
                    placed.others_have_ended()
                    placed.require_lengths(outline)
                    placed.publish([*beside, *outline.commit])
            except BaseException as error:
                placed.uploads.stop(waits=False)
                # What the others still make is removed by whoever writes there next.
                if self._end("failed", self.record(error)):
                    placed.others_have_ended()
                raise
        verdict = {
            "moved": asdict(written),
            "shares": [share, *(end["share"] for end in ends)],
            "resumed": 0,
            "notes": (_ALONE,) if is_alone else (),
            "published_by": 0,
        }
        self._end("published", verdict)
        return SharedResult.of(verdict)

    def _follow(self, decided: Decided, *, jobs: int | None) -> SharedResult:
        meeting, seat = self.meeting, self.meeting.seat
        plan = self._heard(_PLAN)
        meeting.take_seat()
        self.has_begun = True
        # What is shown at the end only, or is one file, comes from rank 0.
        uploads = Uploads(self.target, is_file=False, is_held=False)
        watch = self._watch(lambda _: None)
        try:
            with watch, _stopped(uploads):
                source = decided.job.catalog.source
                compare(plan["look"], look_of(decided), source=source, rank=seat.rank, host=host())
                mine, share = self._work(decided, uploads, watch, jobs, alone=plan["alone"])
                meeting.end("done", {"moved": mine, "share": share})
                verdict = watch.wait()
        except BaseException as error:
            with suppress(OSError, RankError):
                if error is watch.fault:
                    meeting.beat("left")
                else:
                    meeting.end("failed", self.record(error))
            raise
        with suppress(OSError, RankError):
            meeting.beat("left")
        return SharedResult.of(verdict or {})

    def _watch(self, progress: Callable[[int], None]) -> Watch:
        # Whoever fails before it comes refuses.
        return Watch(self.meeting, progress=progress, require_no_fault=lambda _: None)

    def _end(self, state: State, record: dict[str, Any]) -> bool:
        """Tell the others, and wait a little until they know; returns whether they do."""
        with suppress(OSError, RankError):
            self.meeting.end(state, record)
            return watching.wait_for_farewell(self.meeting)
        return False

    def _work(
        self,
        decided: Decided,
        uploads: Uploads,
        watch: Watch,
        jobs: int | None,
        *,
        alone: bool,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send this rank's objects; returns what it moved, and its row of the report."""
        outline, catalog, seat = decided.outline, decided.job.catalog, self.meeting.seat
        begun = time.perf_counter()
        pieces = cutting.cut(outline, border=1, smallest=1, whole=True)
        of = 1 if alone else seat.size
        shares = cutting.deal(pieces, range(len(pieces)), of, reflinks=False)
        mine = shares[seat.rank] if seat.rank < of else ()
        moved = execute(
            outline,
            source=catalog.path,
            target=self.target,
            identities=catalog.identities,
            jobs=jobs,
            progress=watch.advance,
            allow_overflow=True,
            uploads=uploads,
            stints=[(outline.files[index], None) for index in mine],
        )
        share = RankShare(seat.rank, host(), watch.nbytes, time.perf_counter() - begun)
        return asdict(moved), asdict(share)


@contextmanager
def _stopped(uploads: Uploads) -> Iterator[None]:
    """Leaves no part of an upload behind where it does not end well."""
    try:
        yield
    except BaseException:
        uploads.stop()
        raise


def met(seat: Seat, target: RemotePath) -> Afar:
    """A conversion that begins.

    Args:
        seat: Which of the processes that torchrun started this one is.
        target: Where the result goes.

    Raises:
        DcpconvError: torchrun did not start this process as that rank.
        GoneRankError: Nobody answers where it says that the ranks meet.
    """
    hint = "torchrun --nproc-per-node N -m dcpconv convert SRC DST, without --rank and --of"
    return Afar(meet(seat, "write into a store", target, hint=hint), target)
