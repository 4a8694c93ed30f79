"""Writes files from the first byte to the last, where a file system takes them no other way.

Every file has one owner.  All owners go through their files at the same time, a window each per
round; in a round every rank sends every owner what it holds of that owner's window.  A rank needs
memory for the window that it writes and for as many bytes that it sends, whatever the model's size.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcpconv.conversion.saving.runs import Losses, Run, runs_of
from dcpconv.conversion.saving.shares import Owned, Share, Write
from dcpconv.engine.boxes import restrict
from dcpconv.engine.copying import write_error
from dcpconv.engine.execute import CastLoss
from dcpconv.engine.tensors import memory

WINDOW = 32 << 20
"""Bytes of a file that its owner gathers at a time."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Bytes ``start`` to ``stop`` of a file."""

    file: Owned
    start: int
    stop: int


def gather_files(
    share: Share,
    *,
    item: Callable[[int], Tensor],
    group: Any,
    progress: Callable[[int], None],
) -> tuple[CastLoss, ...]:
    """Write the files that this rank owns, and send the others what it holds of theirs.

    All ranks of the group have to call this.

    Args:
        share: What this rank holds, and who writes what.
        item: The tensor of an item of the rank's plan.
        group: From ``sending_group``.
        progress: Called with the bytes of this rank's tensors that have gone out.

    Returns:
        What casts changed by more than rounding.

    Raises:
        NoSpaceError: The disk is full.
    """
    losses = Losses()
    ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    by_file: dict[str, list[Write]] = defaultdict(list)
    for write in share.writes:
        by_file[write.file].append(write)
    failure: OSError | None = None
    writer = _Writer(share.directory)
    for windows in _rounds(share.whole, ranks):
        sent = [
            [] if window is None else list(_held_in(window, by_file, item, losses))
            for window in windows
        ]
        progress(sum(len(run.data) for runs in sent for run in runs))
        head, body = _exchange(sent, group)
        window = windows[rank]
        if window is None or failure is not None:
            continue  # the others still wait for what this rank holds
        try:
            writer.append(window, head, body)
        except OSError as error:
            failure = error
    writer.close()
    if failure is not None:
        raise write_error(failure, share.directory) from failure
    return losses.all()


def sending_group(group: dist.ProcessGroup | None) -> Any:
    """A group of the same ranks that sends memory of this process; ``None`` for a process alone.

    All ranks of the group have to call this.
    """
    if not dist.is_initialized():
        return None
    group = group or dist.group.WORLD
    if "gloo" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _rounds(files: Sequence[Owned], ranks: int) -> Iterator[list[_Window | None]]:
    """By round, the window of every owner; ``None`` for one that has written all of its files."""
    queues = [_windows([file for file in files if file.owner == rank]) for rank in range(ranks)]
    while any(windows := [next(queue, None) for queue in queues]):
        yield windows


def _windows(files: Sequence[Owned]) -> Iterator[_Window]:
    for file in files:
        for start in range(0, file.nbytes, WINDOW):
            yield _Window(file, start, min(start + WINDOW, file.nbytes))


def _held_in(
    window: _Window,
    by_file: dict[str, list[Write]],
    item: Callable[[int], Tensor],
    losses: Losses,
) -> Iterator[Run]:
    """What this rank holds of a window."""
    for write in by_file[window.file.name]:
        itemsize = write.target_dtype.itemsize
        # An element on the border is sent for both windows, and each keeps its part.
        first = max(0, (window.start - write.offset) // itemsize)
        last = -(-(window.stop - write.offset) // itemsize)
        if last <= 0:
            continue
        parts = tuple(
            piece
            for part in write.parts
            for piece in restrict(part, first, last, itemsize=write.source_dtype.itemsize)
        )
        if parts:
            yield from runs_of(write, parts, item(write.item), losses)


def _exchange(sent: list[list[Run]], group: Any) -> tuple[list[list[int]], Tensor]:
    """What all ranks hold of this rank's window: ``[offset in the file, length]`` of every run, and
    their bytes end to end."""
    heads = [
        torch.tensor([(run.offset, len(run.data)) for run in runs], dtype=torch.int64).view(-1)
        for runs in sent
    ]
    bodies = [torch.empty(sum(len(run.data) for run in runs), dtype=torch.uint8) for runs in sent]
    for runs, body in zip(sent, bodies, strict=True):
        into, at = memory(body), 0
        for run in runs:
            into[at : at + len(run.data)] = run.data
            at += len(run.data)
    sizes = torch.tensor([[len(head), len(body)] for head, body in zip(heads, bodies, strict=True)])
    wanted = torch.empty_like(sizes)
    if group is None:
        wanted = sizes
    else:
        dist.all_to_all_single(wanted, sizes, group=group)
    head = _swap(heads, wanted[:, 0].tolist(), group).view(-1, 2).tolist()
    body = _swap(bodies, wanted[:, 1].tolist(), group)
    return head, body


def _swap(sent: Sequence[Tensor], wanted: list[int], group: Any) -> Tensor:
    """What every rank sends to this one, end to end."""
    if group is None:
        return sent[0]
    received = torch.empty(sum(wanted), dtype=sent[0].dtype)
    dist.all_to_all_single(
        received, torch.cat(list(sent)), wanted, [len(part) for part in sent], group=group
    )
    return received


class _Writer:
    """The files that this rank owns, one after another, each from its first byte to its last."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = -1

    def append(self, window: _Window, head: Sequence[Sequence[int]], body: Tensor) -> None:
        """Write a window once all that lies in it has come."""
        file = window.file
        data = memoryview(bytearray(window.stop - window.start))
        for offset, literal in file.literals:
            self._lay(data, offset - window.start, memoryview(literal))
        view, at = memory(body), 0
        for offset, nbytes in head:
            self._lay(data, offset - window.start, view[at : at + nbytes])
            at += nbytes
        if window.start == 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            path = self._directory / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, flags, 0o666)
        while data:
            data = data[os.write(self._fd, data) :]
        if window.stop == file.nbytes:
            os.fsync(self._fd)
            self.close()

    @staticmethod
    def _lay(window: memoryview, at: int, data: memoryview) -> None:
        """Put what lies in the window to its place."""
        data = data[max(0, -at) :]
        at = max(0, at)
        length = min(len(data), len(window) - at)
        if length > 0:
            window[at : at + length] = data[:length]

    def close(self) -> None:
        """Let go of a file that is whole, or that will never be."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
