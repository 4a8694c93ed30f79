"""Writes one rank's share from the memory of its tensors into files that others write too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dcpconv.conversion.saving.runs import Losses, Run, runs_of
from dcpconv.conversion.saving.shares import Share, Write
from dcpconv.core.errors import FormatError
from dcpconv.engine.copying import write as write_all
from dcpconv.engine.copying import write_back, write_error
from dcpconv.engine.execute import CastLoss

if TYPE_CHECKING:
    from dcpconv.engine.passing import PassingDigests

STRIDE = 8 << 20
"""Bytes per write.  A file takes one write at a time (ext4, XFS), so the others wait for as long as
one takes; and the disk starts on what is written."""


def write_share(
    share: Share,
    *,
    item: Callable[[int], Tensor],
    jobs: int | None,
    progress: Callable[[int], None],
    digests: PassingDigests | None = None,
) -> tuple[CastLoss, ...]:
    """Write, sync and close everything that this rank holds.

    Args:
        share: What to write where.
        item: The tensor of an item of the rank's plan; its memory may be on any device.
        jobs: Threads; by default as many as there are CPUs, 4 at most.
        progress: Called from the threads with bytes written since its last call.
        digests: Take what is written.

    Returns:
        What casts changed by more than rounding.

    Raises:
        FormatError: A file is not there: this rank does not see the coordinator's directory.
        NoSpaceError: The disk is full.
    """
    losses = Losses()
    with ExitStack() as stack:
        names = dict.fromkeys(write.file for write in share.writes)
        fds = {name: _open(share.directory / name, stack) for name in names}
        _wait_for_devices(item(number) for number in {write.item for write in share.writes})
        pool = ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1), "dcpconv-save")
        stack.callback(pool.shutdown, cancel_futures=True)

        def perform(write: Write) -> None:
            taking = None if digests is None else digests.file(write.file)
            try:
                for run in runs_of(write, write.parts, item(write.item), losses):
                    _put(fds[write.file], run)
                    if taking is not None:
                        taking.take(run.offset, run.data)
            except OSError as error:
                raise write_error(error, share.directory / write.file) from error
            progress(write.nbytes)

        for future in [pool.submit(perform, write) for write in share.writes]:
            future.result()
        for name, fd in fds.items():
            _sync(fd, share.directory / name)
    return losses.all()


def _wait_for_devices(held: Iterable[Tensor]) -> None:
    """Threads copy on the default stream: what the caller's stream is at has to be done by then."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in {tensor.device for tensor in held if tensor.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()


def _open(path: Path, stack: ExitStack) -> int:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FormatError(
            "a rank cannot open a file that rank 0 has made",
            [("file", path), ("reason", error.strerror)],
            hint="save to a directory that every rank sees under the same name",
        ) from error
    stack.callback(os.close, fd)
    return fd


def _put(fd: int, run: Run) -> None:
    data, offset = run.data, run.offset
    while data:
        piece = data[: STRIDE - offset % STRIDE]
        write_all(fd, piece, offset)
        write_back(fd, offset, len(piece))
        data, offset = data[len(piece) :], offset + len(piece)


def _sync(fd: int, path: Path) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        raise write_error(error, path) from error
