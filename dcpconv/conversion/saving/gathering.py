"""Writes files from the first byte to the last, where a disk or a store takes them no other way.

Every file has one owner.  All owners go through their files at the same time, a window each per
round; in a round every rank sends every owner what it holds of that owner's window.  A rank needs
memory for the window that it writes and for as many bytes that it sends, whatever the model's size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcpconv.conversion.saving.runs import Losses, Run, runs_of
from dcpconv.conversion.saving.shares import Owned, Share, Write
from dcpconv.conversion.saving.whole_files import WholeFiles
from dcpconv.engine.boxes import restrict
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


@dataclass(frozen=True, slots=True)
class Gathered:
    """How it ended, after all ranks have told each other.

    Attributes:
        losses: What casts of this rank changed by more than rounding.
        failure: What went wrong on this rank.
        is_whole: Whether nothing went wrong on any.
    """

    losses: tuple[CastLoss, ...]
    failure: Exception | None
    is_whole: bool


def gather_files(
    share: Share,
    *,
    item: Callable[[int], Tensor],
    check: Callable[[], None],
    files: WholeFiles,
    group: Any,
    progress: Callable[[int], None],
) -> Gathered:
    """Write the files that this rank owns, and send the others what it holds of theirs.

    All ranks of the group have to call this.  The first failure of one ends it for all, and
    returns where all have ended.

    Args:
        share: What this rank holds, and who writes what.
        item: The tensor of an item of the rank's plan.
        check: Raises where this rank holds something that must not be written.
        files: Where the files go that this rank owns.
        group: From ``sending_group``.
        progress: Called with the bytes of this rank's tensors that have gone out.
    """
    losses = Losses()
    ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    by_file: dict[str, list[Write]] = defaultdict(list)
    for write in share.writes:
        by_file[write.file].append(write)
    failure: Exception | None = None
    is_whole = False
    try:
        try:
            check()
        except Exception as error:  # noqa: BLE001 - the others hear of it first
            failure = error
        for windows in _rounds(share.whole, ranks):
            sent: list[list[Run]] | None = None
            try:
                if failure is None:
                    sent = [list(_held_in(window, by_file, item, losses)) for window in windows]
                    progress(sum(len(run.data) for runs in sent for run in runs))
            except Exception as error:  # noqa: BLE001 - likewise
                failure, sent = error, None
            received = _exchange(sent, ranks, group)
            if received is None:
                break
            if (window := windows[rank]) is None:
                continue
            try:
                files.append(window.file, window.start, _assembled(window, *received))
            except Exception as error:  # noqa: BLE001 - likewise
                failure = error
        else:
            try:
                if failure is None:
                    files.settle()
                    is_whole = True
            except Exception as error:  # noqa: BLE001 - likewise
                failure = error
        if not is_whole:
            files.give_up()
        is_whole = _all_are_well(group, is_well=is_whole)
    finally:
        if not is_whole:
            files.give_up()
    return Gathered(losses.all(), failure, is_whole)


def _all_are_well(group: Any, *, is_well: bool) -> bool:
    """Whether that is so on every rank."""
    told = torch.tensor([int(is_well)])
    if group is not None:
        dist.all_reduce(told, dist.ReduceOp.MIN, group=group)
    return bool(told.item())


@contextmanager
def sending_group(group: dist.ProcessGroup | None) -> Iterator[Any]:
    """Lends a group of the same ranks that sends memory of this process; ``None`` for a process
    alone.

    All ranks of the group have to call this.
    """
    if not dist.is_initialized():
        yield None
        return
    group = group or dist.group.WORLD
    if "gloo" in dist.get_backend_config(group):
        yield group
        return
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    try:
        yield made
    finally:
        dist.destroy_process_group(made)


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
    window: _Window | None,
    by_file: dict[str, list[Write]],
    item: Callable[[int], Tensor],
    losses: Losses,
) -> Iterator[Run]:
    """What this rank holds of a window."""
    if window is None:
        return
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


def _exchange(
    sent: list[list[Run]] | None, ranks: int, group: Any
) -> tuple[list[list[int]], Tensor] | None:
    """What all ranks hold of this rank's window: ``[offset in the file, length]`` of every run, and
    their bytes end to end; ``None`` where a rank sends nothing, because something went wrong."""
    if sent is None:
        _swap_sizes(torch.full((ranks, 2), -1), group)
        return None
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
    wanted = _swap_sizes(sizes, group)
    if bool((wanted < 0).any()):
        return None
    head = _swap(heads, wanted[:, 0].tolist(), group).view(-1, 2).tolist()
    body = _swap(bodies, wanted[:, 1].tolist(), group)
    return head, body


def _swap_sizes(sizes: Tensor, group: Any) -> Tensor:
    """Bytes and runs that every rank has for this one, of those that each has for every other."""
    if group is None:
        return sizes
    wanted = torch.empty_like(sizes)
    dist.all_to_all_single(wanted, sizes, group=group)
    return wanted


def _swap(sent: Sequence[Tensor], wanted: list[int], group: Any) -> Tensor:
    """What every rank sends to this one, end to end."""
    if group is None:
        return sent[0]
    received = torch.empty(sum(wanted), dtype=sent[0].dtype)
    dist.all_to_all_single(
        received, torch.cat(list(sent)), wanted, [len(part) for part in sent], group=group
    )
    return received


def _assembled(window: _Window, head: Sequence[Sequence[int]], body: Tensor) -> memoryview:
    """All bytes of a window, once all that lies in it has come."""
    data = memoryview(bytearray(window.stop - window.start))
    for offset, literal in window.file.literals:
        _lay(data, offset - window.start, memoryview(literal))
    view, at = memory(body), 0
    for offset, nbytes in head:
        _lay(data, offset - window.start, view[at : at + nbytes])
        at += nbytes
    return data


def _lay(window: memoryview, at: int, data: memoryview) -> None:
    """Put what lies in the window to its place."""
    data = data[max(0, -at) :]
    at = max(0, at)
    length = min(len(data), len(window) - at)
    if length > 0:
        window[at : at + length] = data[:length]
