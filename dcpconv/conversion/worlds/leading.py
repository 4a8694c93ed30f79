"""What the rank that leads does for all: it publishes, tells how it ended, and cleans up.

Rank 0 leads.  Where the ranks are jobs of an array and it has ended once its share was done, one of
the others goes on: the one that takes a file that nobody else has, and the lock of the staging
directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpconv.conversion.deciding import Decided
from dcpconv.conversion.worlds.planning import Plan, length_of, read_plan
from dcpconv.conversion.worlds.results import added_up
from dcpconv.core.errors import DcpconvError, TargetExistsError
from dcpconv.core.outline import Outline
from dcpconv.engine.copying import write_error
from dcpconv.engine.publish import Staging, inherited
from dcpconv.engine.worlds import watching
from dcpconv.engine.worlds.early import this_start
from dcpconv.engine.worlds.faults import GoneRankError, is_told, to_record
from dcpconv.engine.worlds.meeting import Meeting, State
from dcpconv.engine.worlds.seats import host

if TYPE_CHECKING:
    from dcpconv.conversion.printing import ResultDigests


class Lead:
    """The staging directory, and what is done with it, by the rank that leads.

    Args:
        decided: The conversion.
        plan: What rank 0 decided.
        meeting: Where the ranks meet.
        stage: The staging directory, where this rank leads from the beginning.
        digests: Take what is read to be compared before it is published.

    Attributes:
        may_pass: Whether another rank may go on where the one that leads has ended.
    """

    def __init__(
        self,
        decided: Decided,
        plan: Plan,
        meeting: Meeting,
        *,
        stage: Staging | None,
        digests: ResultDigests | None,
    ) -> None:
        self.decided, self.plan, self.meeting, self.stage = decided, plan, meeting, stage
        self._digests = digests
        self.may_pass = not plan.run
        self._has_claimed = False
        self._stack = ExitStack()

    def close(self) -> None:
        """Give up what this rank has inherited."""
        self._stack.close()

    def succeed(self, rank: int) -> bool:
        """Lead from now on, after a rank that did; ``False`` where another process does, or that
        one has not let go yet.

        Raises:
            DcpconvError: There is nothing to go on with.
        """
        wanted = self.decided.job.wanted
        is_file = self.decided.job.is_one_file
        with writing(self.meeting.path), ExitStack() as stack:
            self._has_claimed = self._has_claimed or self.meeting.claim_lead(rank)
            if not self._has_claimed:
                return False
            try:
                stage = stack.enter_context(
                    inherited(wanted.path, overwrite=wanted.overwrite, is_file=is_file)
                )
            except TargetExistsError:
                self._require_plan()
                return False
            stage.keeping = True
            self._require_plan()
            self.meeting.beat(leads=True)
            stage.keeping = False
            self.stage = stage
            self._stack = stack.pop_all()
        return True

    def _require_plan(self) -> None:
        plan = read_plan(self.meeting.path)
        if plan is None or plan.token != self.plan.token:
            raise GoneRankError(
                "the rank that led has ended without a word",
                [("rank", f"{self.meeting.seat.rank} on {host()}"), ("at", self.meeting.path)],
                hint="is the target there? otherwise run the same again",
            )

    def publish(self, *, jobs: int | None) -> dict[str, Any]:
        """Make the result visible once all shares are done; returns what to tell the others.

        Args:
            jobs: Threads to read with.

        Raises:
            LossyCastError: Casts overflowed.
            DcpconvError: The result is not as planned, or cannot be made visible.
        """
        decided, meeting, stage = self.decided, self.meeting, self._own_stage()
        ends = [meeting.end_of(rank) or {} for rank in range(meeting.seat.size)]
        pieces = self.plan.pieces(decided.outline)
        written = added_up(decided, [*self.plan.before, *(end["moved"] for end in ends)])
        if meeting.is_succeeded:
            raise GoneRankError(
                "another rank leads by now",
                [("rank", f"{meeting.seat.rank} on {host()}")],
                hint="this process stood still for longer than the others wait",
            )
        if not _is_published(decided.outline, stage):
            _require_sizes(decided.outline, stage.path)
            beside = [(file.name, file.read()) for file in decided.side.files]
            if decided.job.wanted.fingerprint:
                from dcpconv.conversion.worlds import reading_back  # noqa: PLC0415 - few ask

                by_rank = [self.plan.digests, *(end["digests"] for end in ends)]
                taking = self._digests.passing if self._digests is not None else None
                reading_back.require_digests(
                    decided.outline, pieces, by_rank, stage.path, jobs=jobs, taking=taking
                )
            if self._digests is not None:
                beside.append(self._digests.finish(stage.path, jobs=jobs))
            # What lies in the staging directory after the exchange is the old target.
            stage.publish(
                [*beside, *decided.outline.commit], exchanging=(meeting.path / "plan").unlink
            )
        elif self._digests is not None:
            self._digests.finish(self._digests.source.catalog.path, jobs=jobs)
        verdict = {
            "moved": asdict(written),
            "shares": [end["share"] for end in ends],
            "resumed": sum(pieces[index].payload for index in self.plan.done),
            "notes": (_WHOLE,) if self.plan.whole else (),
            "published_by": meeting.seat.rank,
        }
        self._end("published", verdict)
        return verdict

    def fail(self, error: BaseException, *, is_done: bool) -> None:
        """Tell the others, or leave them the lead where this process is only told to end."""
        stage = self._own_stage()
        record = to_record(error, rank=self.meeting.seat.rank, host=host())
        stage.keeping = record["keep"] and (self.meeting.path / "plan").exists()
        if is_done and self.may_pass and is_told(error) and stage.keeping:
            with suppress(OSError):
                self.meeting.beat("left")
        else:
            self._end("failed", record)

    def _own_stage(self) -> Staging:
        if self.stage is None:
            raise AssertionError("another rank leads")
        return self.stage

    def _end(self, state: State, record: dict[str, Any]) -> None:
        with suppress(OSError):
            self.meeting.end(state, record)
            this_start().has_met = watching.wait_for_farewell(self.meeting)


_WHOLE = (
    "files on this file system are written by one process or not at all: each rank wrote whole ones"
)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What it means that the ranks cannot meet."""
    try:
        yield
    except DcpconvError:
        raise
    except OSError as error:
        raise write_error(error, path) from error


def _is_published(outline: Outline, stage: Staging) -> bool:
    """Whether the rank that led before has made the result visible: then it is all there, and
    nothing of it is left here."""
    if not outline.files or any(length_of(stage.path / file.name) >= 0 for file in outline.files):
        return False
    place = stage.target.parent if stage.is_file else stage.target
    return all(length_of(place / file.name) == file.nbytes for file in outline.files)


def _require_sizes(outline: Outline, result: Path) -> None:
    wrong = [
        ("file", f"{file.name}: {length_of(result / file.name):,} bytes, not {file.nbytes:,}")
        for file in outline.files
        if length_of(result / file.name) != file.nbytes
    ]
    if wrong:
        raise DcpconvError("files of the result are not as long as planned", wrong)
