"""Threads that carry out units of work with buffers of their own, and stop together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from dcpconv.core.errors import DcpconvError
from dcpconv.core.outline import OutFile
from dcpconv.engine.boxes import read_runs
from dcpconv.engine.copying import Ladder, OutDirectory, Output, write_error
from dcpconv.engine.desks import Desk, at_desks
from dcpconv.engine.units import Given, Run, Stretch, Tile, Unit, units
from dcpconv.stores.local import Sources

if TYPE_CHECKING:
    from dcpconv.engine.uploading import Upload, Uploads
    from dcpconv.stores.ahead import Ahead

_Work = tuple["Output | Upload", Unit | None]
"""A unit with its file, or the end of the listing of a file."""

Stint = tuple[OutFile, tuple[int, int] | None]
"""A file to write, and ``(start, stop)`` of its bytes where it is not all of them."""


class Crew:
    """Threads that share one iterator of units, so that what exists at a time is a unit each.

    Args:
        stints: What to write.
        target: Where the files are, or will be.
        sources: Where to read.
        ladder: How to copy long runs.
        desks: One per thread, all of the same size.
        progress: Called with payload bytes done since its last call.
        uploads: What makes objects of the files, where they go into a store.
    """

    def __init__(
        self,
        *,
        stints: Iterable[Stint],
        target: OutDirectory,
        sources: Sources,
        ladder: Ladder,
        desks: list[Desk],
        progress: Callable[[int], None],
        uploads: Uploads | None = None,
    ) -> None:
        self.desks = desks
        self._uploads = uploads
        self._sources = sources
        self._ladder = ladder
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        if uploads is not None:
            uploads.halt = self._stop
        self._errors: list[BaseException] = []
        self._open: set[Output | Upload] = set()
        self._work = self._list(stints, target)
        self._ahead: Ahead[_Work] | None = None
        if sources.is_remote:
            from dcpconv.engine.wanting import of_unit  # noqa: PLC0415 - files here need none
            from dcpconv.stores.ahead import Ahead  # noqa: PLC0415

            self._ahead = Ahead(sources, self._work, lambda work: of_unit(work[1]))
            self._work = self._ahead

    def run(self) -> None:
        """Do everything, or raise the first error once every thread has stopped."""
        try:
            at_desks(self.desks, self._loop, stop=self._stop)
        finally:
            if self._ahead is not None:
                self._ahead.close()
            for output in self._open:
                if isinstance(output, Output):
                    os.close(output.fd)
        if self._errors:
            raise self._errors[0]

    def _list(self, stints: Iterable[Stint], target: OutDirectory) -> Iterator[_Work]:
        """Every unit with its file, and ``None`` once all units of a file are listed."""
        block, tile = self._ladder.block, self.desks[0].size
        is_far = self._sources.is_remote or self._uploads is not None
        for file, within in stints:
            output = self._uploads.open(file) if self._uploads else Output(target, file)
            self._open.add(output)
            for unit in units(file, block=block, tile=tile, within=within, is_far=is_far):
                yield output, unit
            yield output, None

    def _loop(self, desk: Desk) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    work = next(self._work, None)
                    if work and work[1]:
                        work[0].pending += 1
                        work[0].announce(work[1])
                if not work:
                    return
                done = self._write(*work, desk)
                if self._ahead is not None:
                    self._ahead.done(work)
                if done:
                    self._progress(done)
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            self._errors.append(error)
            self._stop.set()
            if self._uploads is not None:
                self._uploads.stop(waits=False)
        finally:
            desk.clear()

    def _write(self, output: Output | Upload, unit: Unit | None, desk: Desk) -> int:
        """Do one unit, or end the listing of a file; returns payload bytes."""
        try:
            done = 0
            if unit:
                done = self._do(unit, output, desk)
                output.write_back(unit, self._ladder.system)
            self._release(output)
        except OSError as error:
            if isinstance(error, DcpconvError):
                raise
            raise write_error(error, output.path) from error
        return done

    def _release(self, output: Output | Upload) -> None:
        with self._lock:
            output.pending -= 1
            if output.pending:
                return
            self._open.discard(output)
        output.finish()

    def _do(self, unit: Unit, output: Output | Upload, desk: Desk) -> int:
        if isinstance(unit, Run):
            with self._sources.open(unit.file) as source:
                if not isinstance(output, Output):
                    output.receive(source, unit.source_offset, unit.offset, unit.nbytes)
                    desk.tally.buffered += unit.nbytes
                    return unit.nbytes
                self._ladder.copy(
                    source,
                    output.fd,
                    source_offset=unit.source_offset,
                    target_offset=unit.offset,
                    nbytes=unit.nbytes,
                    buffer=desk.tile,
                    tally=desk.tally,
                    digests=output.digests,
                )
            return unit.nbytes
        if isinstance(unit, Given):
            output.write(unit.data, unit.offset, system=self._ladder.system)
            return 0
        if isinstance(unit, Tile):
            return self._cast(unit, output, desk)
        return self._assemble(unit, output, desk)

    def _assemble(self, stretch: Stretch, output: Output | Upload, desk: Desk) -> int:
        """Put a stretch together and write it."""
        payload = sum(p.nbytes for p in stretch.pieces if not isinstance(p, Given))
        if payload == stretch.nbytes and self._is_hole(stretch):
            desk.tally.holes += payload
            output.skip(stretch)
            return payload
        tile = desk.tile[: stretch.nbytes]
        runs: dict[str, list[tuple[int, int, int]]] = {}
        end = 0
        for piece in stretch.pieces:
            at = piece.offset - stretch.offset
            tile[end:at] = bytes(at - end)
            end = at + piece.nbytes
            if isinstance(piece, Given):
                tile[at:end] = piece.data
            elif isinstance(piece, Run):
                runs.setdefault(piece.file, []).append((piece.source_offset, at, piece.nbytes))
                desk.tally.buffered += piece.nbytes
            else:
                self._gather(piece, desk, into=tile[at:end], at=at)
                if piece.box.is_relabelled:
                    desk.tally.relabelled += piece.nbytes
                else:
                    desk.tally.buffered += piece.nbytes
        read_runs(runs, sources=self._sources, into=tile)
        output.write(tile, stretch.offset, system=self._ladder.system)
        return payload

    def _is_hole(self, stretch: Stretch) -> bool:
        for piece in stretch.pieces:
            if isinstance(piece, Run):
                with self._sources.open(piece.file) as source:
                    if not source.is_hole(piece.source_offset, piece.nbytes):
                        return False
            elif isinstance(piece, Tile) and not piece.box.is_hole(
                piece.start, piece.stop, sources=self._sources
            ):
                return False
        return True

    def _gather(self, tile: Tile, desk: Desk, *, into: memoryview, at: int = 0) -> None:
        tile.box.read(
            tile.start,
            tile.stop,
            sources=self._sources,
            into=into,
            scratch=lambda: desk.scratch,
            slices=desk.slices,
            at=at,
        )

    def _cast(self, tile: Tile, output: Output | Upload, desk: Desk) -> int:
        from dcpconv.engine.cast import cast  # noqa: PLC0415 - most tiles go over as they are

        fill = tile.box.fill
        source = desk.tile[: (tile.stop - tile.start) * tile.box.itemsize]
        result = desk.output[: tile.nbytes]
        self._gather(tile, desk, into=source)
        if fill.changes:
            from dcpconv.engine.dequantise import work_out  # noqa: PLC0415 - few need it

            dtype = fill.computed_dtype
            made = desk.output[: (tile.stop - tile.start) * dtype.itemsize]
            work_out(
                tile.box,
                tile.start,
                tile.stop,
                source=source,
                into=made,
                sources=self._sources,
                scratch=desk.scratch,
            )
            result = desk.tile[: tile.nbytes]  # what was read into it has been used
            lost = cast(made, result, source_dtype=dtype, target_dtype=fill.target_dtype)
        elif fill.scales:
            from dcpconv.engine.dequantise import multiply_out  # noqa: PLC0415 - few need it

            lost = multiply_out(
                tile.box,
                tile.start,
                tile.stop,
                source=source,
                into=result,
                sources=self._sources,
                scratch=desk.scratch,
            )
        else:
            lost = cast(
                source, result, source_dtype=fill.source_dtype, target_dtype=fill.target_dtype
            )
        output.write(result, tile.offset, system=self._ladder.system)
        if fill.changes:
            desk.tally.merged += tile.nbytes
        else:
            desk.tally.cast += tile.nbytes
        if any(lost):
            place = (output.name, tile.payload)
            known = desk.losses.get(place, (0, 0))
            desk.losses[place] = (known[0] + lost[0], known[1] + lost[1])
        return tile.nbytes
