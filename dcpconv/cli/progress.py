"""A bar on stderr, where a person is looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dcpconv.cli.answers import is_watched

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """How far a command is; threads may call it.

    Args:
        progress: Where it is drawn.
        word: What is being done, once it is known how much there is.
    """

    def __init__(self, progress: Progress, word: str) -> None:
        self._progress = progress
        self._word = word
        self._task: TaskID = progress.add_task("planning", total=None)

    def total(self, nbytes: int) -> None:
        """There are so many bytes to do in all."""
        self._progress.update(self._task, description=self._word, total=nbytes)

    def advance(self, nbytes: int) -> None:
        """So many more are done."""
        self._progress.advance(self._task, nbytes)

    def show(self, done: int, total: int) -> None:
        """So many are done of all there are."""
        self._progress.update(self._task, description=self._word, completed=done, total=total)


@contextmanager
def bar(word: str, *, quiet: bool) -> Iterator[Bar | None]:
    """A bar until the block ends, which leaves no trace of it; ``None`` if nobody is looking.

    Args:
        word: What is being done.
        quiet: Whether nobody wants to know.
    """
    if quiet or not is_watched():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        yield Bar(progress, word)


def calls(shown: Bar | None) -> dict[str, Callable[[int], None]]:
    """What the functions of the package that read tensors call, by the names of their arguments."""
    return {} if shown is None else {"progress": shown.advance, "total": shown.total}
