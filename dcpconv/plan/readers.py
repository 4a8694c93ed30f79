"""Tensors that several processes read together: each digests its share, and all get the whole.

The shares are those of a conversion: a tensor counts as one file of a result, cut at the borders of
the chunks of its digest.  What the ranks say to each other they say at places in the program that
all of them come to; who waits there looks after the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import DcpconvError
from dcpconv.core.outline import Fill, OutFile
from dcpconv.engine import cutting
from dcpconv.engine.chunks import CHUNK
from dcpconv.engine.cutting import OutPiece
from dcpconv.engine.hashing import Digests, count_of, hash_all
from dcpconv.engine.sharing import Stretch, stretches_of
from dcpconv.engine.worlds import watching
from dcpconv.engine.worlds.faults import from_record, to_record
from dcpconv.engine.worlds.look import Look, compare, digest_of, sources_of
from dcpconv.engine.worlds.meeting import Meeting
from dcpconv.engine.worlds.seats import RankError, Seat, host
from dcpconv.engine.worlds.torchrun import meet
from dcpconv.engine.worlds.watching import Watch
from dcpconv.stores.local import Sources

_REASONS = 20
"""Reasons that a rank gives where another comes to another answer."""


class Readers:
    """The processes that read together, as one of them sees them.

    Args:
        meeting: Where they meet.

    Attributes:
        watch: Looks after the others.
    """

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._said = 0
        self._shown = 0
        self._progress: Callable[[int], None] | None = None
        self.watch = Watch(meeting, progress=self._show, require_no_fault=lambda _: None)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self._meeting.seat.rank == 0

    def digests(
        self,
        count: int,
        fill: Callable[[int], Fill],
        *,
        catalog: Catalog,
        jobs: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[bytes]:
        """The digest of every tensor, in order, of which this rank reads its share.

        Args:
            count: Tensors.
            fill: What one of them consists of, by its number.
            catalog: What they are read from.
            jobs: Threads of this rank.
            progress: Called on rank 0 with bytes that all ranks have hashed since its last call.

        Raises:
            RankError: The ranks do not read the same, or one of them is gone.
            DcpconvError: What one process raises; in all ranks where one of them fails.
        """
        self._progress = progress if self.is_first else None
        pieces: list[OutPiece] = []
        look = _look(pieces, count, fill, catalog)
        for rank, other in enumerate(looks := self._gather("read", {"look": look})):
            with _as_rank_error():
                compare(
                    looks[0]["look"],
                    other["look"],
                    source=catalog.source,
                    rank=rank,
                    host=other["host"],
                )
        mine = Digests()
        failure = None
        try:
            with Sources.of(catalog) as sources:
                work = _stretches(self._share(pieces), fill)
                hash_all(work, into=mine, sources=sources, jobs=jobs, progress=self.watch.advance)
        except DcpconvError as error:
            if error is self.watch.fault:
                raise
            failure = self._record(error)
        found = self._gather("digests", {"failure": failure, **_to_json(mine)})
        for other in found:
            if other["failure"] is not None:
                raise from_record(other["failure"])
        return _together(found, pieces)

    def agree(self, answer: bool, reasons: Iterable[str]) -> None:  # noqa: FBT001 - it is the point
        """Make sure that every rank comes to the same answer.

        Args:
            answer: Whether everything is well.
            reasons: Why not.

        Raises:
            RankError: Another rank's is another.
        """
        some = list(reasons)[:_REASONS]
        found = self._gather("answer", {"answer": answer, "reasons": some})
        if len({other["answer"] for other in found}) > 1:
            told = [
                ("rank", f"{rank} on {other['host']}: {reason}")
                for rank, other in enumerate(found)
                for reason in other["reasons"] or ["all is well"]
            ]
            raise RankError(
                "the ranks come to different answers",
                told,
                hint="give every rank the same files, and see that nobody writes them",
            )

    def _share(self, pieces: Sequence[OutPiece]) -> Iterator[OutPiece]:
        seat = self._meeting.seat
        shares = cutting.deal(pieces, range(len(pieces)), seat.size, reflinks=False)
        return (pieces[index] for index in shares[seat.rank])

    def _gather(self, what: str, record: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank says here, by rank."""
        meeting, number = self._meeting, self._said
        self._said += 1
        own = {"what": what, "host": host(), **record}
        meeting.put(f"said-{number}-{meeting.seat.rank}", own)
        found: list[dict[str, Any]] = []
        for _ in watching.pauses():
            while len(found) < meeting.seat.size:
                other = meeting.get(f"said-{number}-{len(found)}")
                if other is None:
                    break
                found.append(other)
            else:
                break
            self.watch.look()
            self.watch.require_all_well()
        if len({other["what"] for other in found}) > 1:
            raise RankError(
                "the ranks do not see the same",
                [
                    ("rank", f"{rank} on {other['host']}: {_PLACES[other['what']]}")
                    for rank, other in enumerate(found)
                ],
                hint="give every rank the same files, and see that nobody writes them",
            )
        return found

    def _show(self, nbytes: int) -> None:
        if self._progress is not None:
            self._progress(nbytes - self._shown)
        self._shown = nbytes

    def _record(self, error: BaseException) -> dict[str, Any]:
        meeting = self._meeting
        return to_record(error, rank=meeting.seat.rank, host=host(), again=meeting.again)

    def leave(self, error: BaseException | None) -> None:
        """Tell the others how it ended, and wait a little until they know.

        Args:
            error: What this rank fails with.
        """
        meeting = self._meeting
        with suppress(OSError, RankError):
            if error is not None:
                is_heard = error is self.watch.fault and not self.is_first
                meeting.beat("left") if is_heard else meeting.end("failed", self._record(error))
            elif self.is_first:
                meeting.end("published", {"shares": []})
            else:
                meeting.beat("left")
                return
            watching.wait_for_farewell(meeting)


_PLACES = {
    "read": "reads tensors",
    "digests": "has read tensors",
    "answer": "has nothing left to read",
}


@contextmanager
def reading(seat: Seat, source: object, command: str) -> Iterator[Readers]:
    """Read together with the other processes that torchrun has started.

    All end together: the others where rank 0 ends this block, and all with the error of one.

    Args:
        seat: Which of them this is.
        source: What is read, for people.
        command: What every rank was started with, for people: ``check SRC --data``.

    Raises:
        DcpconvError: torchrun did not start this process as that rank.
        GoneRankError: A rank does not come, or has gone.
    """
    hint = f"torchrun --nproc-per-node N -m dcpconv {command}, without --rank and --of"
    meeting = meet(seat, "read a checkpoint together", source, hint=hint)
    meeting.take_seat()
    readers = Readers(meeting)
    try:
        with readers.watch as watch:
            yield readers
            if not readers.is_first:
                watch.wait()
    except BaseException as error:
        readers.leave(error)
        raise
    readers.leave(None)


def _look(
    pieces: list[OutPiece], count: int, fill: Callable[[int], Fill], catalog: Catalog
) -> Look:
    """What this rank is about to read; puts all pieces of it into a list on the way."""

    def files() -> Iterator[OutFile]:
        for number in range(count):
            made = fill(number)
            file = OutFile("", made.nbytes, (), ((0, made),))
            pieces.extend(cutting.pieces_of(number, file, smallest=cutting.SMALLEST, border=CHUNK))
            yield file

    return {"sources": sources_of(catalog), "options": {}, "files": {"tensors": digest_of(files())}}


def _stretches(share: Iterable[OutPiece], fill: Callable[[int], Fill]) -> Iterator[Stretch]:
    for piece in share:
        made = fill(piece.file)
        itemsize = made.target_dtype.itemsize
        first, stop = piece.start // itemsize, piece.stop // itemsize
        yield from stretches_of(piece.file, (made,), first, stop)


def _to_json(found: Digests) -> dict[str, Any]:
    return {
        "whole": {str(number): digest.hex() for number, digest in found.whole.items()},
        "parts": {
            str(number): {str(start): chunks.hex() for start, chunks in held.items()}
            for number, held in found.parts.items()
        },
    }


def _together(records: Iterable[dict[str, Any]], pieces: Iterable[OutPiece]) -> list[bytes]:
    """The digest of every tensor, from what each rank has of them."""
    nbytes = {piece.file: piece.stop for piece in pieces}
    found = Digests()
    for record in records:
        found.whole.update({int(n): bytes.fromhex(text) for n, text in record["whole"].items()})
        for number, held in record["parts"].items():
            count = count_of(nbytes[int(number)])
            for start, chunks in held.items():
                found.take(int(number), int(start), bytes.fromhex(chunks), count=count)
    return found.in_order()


@contextmanager
def _as_rank_error() -> Iterator[None]:
    """No rank goes on with something else where ranks see different files."""
    try:
        yield
    except RankError:
        raise
    except DcpconvError as error:
        raise RankError(error.headline, error.facts, hint=error.hint) from error
