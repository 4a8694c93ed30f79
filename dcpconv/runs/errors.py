"""What ``dcpconv.runs`` complains with."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.stores.schemes import refuse_unserved


class RunError(DcpconvError, ValueError):
    """The step that was asked for is not there, or not complete."""

    exit_code = 1


class WantedError(RunError):
    """Which step was asked for cannot be told: not understood, or there are several."""

    exit_code = 2


def command(*words: object) -> str:
    """A command of ours for a hint, ready to be pasted.

    >>> command("latest", "my run")
    "`dcpconv runs latest 'my run'`"
    """
    return f"`{shlex.join(['dcpconv', 'runs', *map(str, words)])}`"


def in_one_line(error: Exception) -> str:
    """An error as one problem among others."""
    if isinstance(error, DcpconvError):
        return error.in_one_line
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error)[:200]}"


@contextmanager
def told(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the system says about a path into an error of ours.

    Raises:
        NotACheckpointError: The path cannot be read: no permission, a name that is too long, a
            null character, a home of nobody.
    """
    refuse_unserved(run_dir)
    try:
        yield
    except DcpconvError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        place = getattr(error, "filename", None) or run_dir
        raise NotACheckpointError(
            "the run directory cannot be read",
            [("path", place), ("because", in_one_line(error))],
        ) from error
