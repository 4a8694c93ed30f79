"""What rank 0 decides about who writes what, and how the others get to know it."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpconv.conversion.deciding import Decided
from dcpconv.core.outline import Outline
from dcpconv.engine import cutting
from dcpconv.engine.copying import OutDirectory, shares_blocks
from dcpconv.engine.cutting import OutPiece
from dcpconv.engine.publish import SHARES, Staging
from dcpconv.engine.space import check_space, spared, writes_anywhere
from dcpconv.engine.worlds import watching
from dcpconv.engine.worlds.early import this_start
from dcpconv.engine.worlds.faults import GoneRankError
from dcpconv.engine.worlds.look import Look
from dcpconv.engine.worlds.meeting import Beat, read_beat, read_done, read_record
from dcpconv.engine.worlds.seats import RankError, Seat, host
from dcpconv.families.side_files import disk_nbytes

if TYPE_CHECKING:
    from typing import TypeGuard

_VERSION = 2
"""Of the plan file: a run does not go on with pieces that were cut in another way."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What rank 0 decided; the pieces follow from it and from the outline.

    Attributes:
        token: Of this run.
        run: ``Seat.run``.
        of: Ranks.
        border: As in ``cutting.cut``.
        smallest: As in ``cutting.cut``.
        whole: As in ``cutting.cut``.
        reflinks: As in ``cutting.deal``.
        look: What rank 0 knows of the source and of the result.
        done: Pieces that an earlier run wrote.
        before: What that run moved.
        digests: Of those pieces, where that run took them, by index.
        version: ``_VERSION``.
    """

    token: str
    run: str
    of: int
    border: int
    smallest: int
    whole: bool
    reflinks: bool
    look: Look
    done: list[int]
    before: list[dict[str, Any]]
    digests: dict[str, str]
    version: int = _VERSION

    def pieces(self, outline: Outline) -> tuple[OutPiece, ...]:
        """All pieces of the result."""
        return cutting.cut(outline, border=self.border, smallest=self.smallest, whole=self.whole)

    def share(self, pieces: tuple[OutPiece, ...], rank: int) -> tuple[int, ...]:
        """Indices of the pieces that a rank writes."""
        done = set(self.done)
        left = [index for index in range(len(pieces)) if index not in done]
        return cutting.deal(pieces, left, self.of, reflinks=self.reflinks)[rank]


def unfinished(path: Path, look: Look) -> Plan | None:
    """The plan of a run that was killed, if it was for the same result."""
    plan = read_plan(path)
    return plan if plan is not None and plan.look == look else None


def read_plan(path: Path) -> Plan | None:
    """The plan that is there, if any."""
    record = read_record(path / "plan")
    if record is None or record.get("version") != _VERSION:
        return None
    return Plan(**record)


def prepare(decided: Decided, stage: Staging, look: Look, seat: Seat) -> Plan:
    """Make the files of the result, as long as they will be, or find out what is in them."""
    outline, path = decided.outline, stage.path
    source = decided.job.catalog.path
    old = unfinished(path.parent / SHARES, look)
    token = secrets.token_hex(8)
    reserved = spared(outline, source=source, stage=path)
    if old is None:
        names = (part.file for f in outline.files for _, fill in f.payloads for part in fill.parts)
        first = next(names, None)
        plan = Plan(
            token=token,
            run=seat.run,
            of=seat.size,
            border=_border(path),
            smallest=cutting.SMALLEST,
            whole=not writes_anywhere(path),
            reflinks=first is not None and shares_blocks(source / first, path),
            look=look,
            done=[],
            before=[],
            digests={},
        )
    else:
        lengths = [length_of(path / file.name) for file in outline.files]
        is_there = [n == file.nbytes for n, file in zip(lengths, outline.files, strict=True)]
        pieces = old.pieces(outline)
        notes = read_done(path.parent / SHARES)
        found = {*old.done, *(index for note in notes for index in note["pieces"])}
        done = sorted(index for index in found if is_there[pieces[index].file])
        plan = replace(
            old,
            token=token,
            run=seat.run,
            of=seat.size,
            done=done,
            # What has been published by now is not there.
            before=[*old.before, *(note["moved"] for note in notes)] if done else [],
            digests={**old.digests, **{k: v for note in notes for k, v in note["digests"].items()}},
        )
        reserved += sum(_occupied(path / file.name) for file in outline.files)
    check_space(decided.job.target, disk_nbytes(outline, decided.side), reflinkable=reserved)
    if not plan.whole:
        for file in outline.files:
            if length_of(path / file.name) != file.nbytes:
                (path / file.name).unlink(missing_ok=True)
                os.close(OutDirectory(path).make(file.name, file.nbytes))
    return plan


def length_of(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def _occupied(path: Path) -> int:
    return 512 * getattr(path.stat(), "st_blocks", 0) if path.is_file() else 0


def _border(path: Path) -> int:
    """What two processes should not both write a part of: a stripe, as far as the file system tells
    (``st_blksize`` of Lustre), or a page."""
    size = path.stat().st_blksize
    is_fit = 4096 <= size <= cutting.SMALLEST and size & (size - 1) == 0
    return size if is_fit else 4096


def wait_for_plan(path: Path, seat: Seat) -> Plan:
    """The plan of a run whose leading rank is alive: one that was killed left the same files.

    Raises:
        GoneRankError: Rank 0 does not come.
        DcpconvError: What it failed with before it could plan.
    """
    start = this_start()
    deadline = time.monotonic() + watching.PATIENCE
    first: dict[int, Beat] = {}
    for _ in watching.pauses():
        plan, beat = read_plan(path), read_beat(path, 0)
        if plan is not None and plan.run == seat.run and _is_of(beat, plan):
            leaders = {0: beat}
            for rank in range(1, plan.of) if beat.state in {"done", "left"} else ():
                other = read_beat(path, rank)
                if _is_of(other, plan) and other.leads:
                    leaders[rank] = other
            for rank, leader in leaders.items():
                if rank not in first or first[rank].token != leader.token:
                    first[rank] = leader
                is_here = leader.is_here and leader.state in {"working", "done"}
                if is_here or leader.count != first[rank].count:
                    return plan
        start.require_no_fault([0])
        if time.monotonic() > deadline:
            raise GoneRankError(
                "rank 0 has not come",
                [
                    ("rank", f"{seat.rank} on {host()}"),
                    ("waited", f"{watching.PATIENCE:.0f} s"),
                    ("at", path),
                ],
                hint="start all ranks at once; their targets must be one directory",
            )
    raise AssertionError


def is_led_by_another(path: Path, seat: Seat) -> bool:
    """Whether a run goes on whose rank 0 has ended: this one is started anew, and comes back."""
    plan = read_plan(path)
    if plan is None or plan.run or seat.run or plan.of != seat.size:
        return False
    first: dict[int, Beat] = {}
    deadline = time.monotonic() + 4 * watching.BEAT
    for _ in watching.pauses():
        beats = {rank: read_beat(path, rank) for rank in range(1, plan.of)}
        leaders = {rank: b for rank, b in beats.items() if _is_of(b, plan) and b.leads}
        for rank, beat in leaders.items():
            if beat.is_here or beat.count != first.setdefault(rank, beat).count:
                return True
        if not leaders or time.monotonic() > deadline:
            return False
    raise AssertionError


def _is_of(beat: Beat | None, plan: Plan) -> TypeGuard[Beat]:
    return beat is not None and beat.token == plan.token


def require_same_number(plan: Plan, seat: Seat) -> None:
    """Refuse a rank of another number of them.

    Raises:
        RankError: It is.
    """
    if plan.of != seat.size:
        raise RankError(
            "the ranks do not agree on their number",
            [("rank", f"{seat.rank} of {seat.size} on {host()}"), ("rank", f"0 of {plan.of}")],
            hint="start every rank with the same --of",
        )
