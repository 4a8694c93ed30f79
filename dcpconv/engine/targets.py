"""Whether a result can be written where the user wants it, before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from dcpconv.core.errors import DcpconvError, TargetExistsError
from dcpconv.stores.schemes import refuse_scheme


class TargetError(DcpconvError, OSError):
    """The target cannot be written where it is."""


def check_target(
    target: Path, *, overwrite: bool, is_file: bool, source: Path | None = None
) -> None:
    """Refuse a target that cannot or must not be written, before any work is done.

    Raises:
        TargetExistsError: It exists and may not be replaced.
        TargetError: It is no place for a result.
        SchemeError: It is a URL.
    """
    refuse_scheme(target)
    target = Path(os.path.realpath(target))
    if source is not None:
        _check_apart(target, Path(os.path.realpath(source)))
    existing = next(path for path in (target, *target.parents) if path.exists())
    if existing != target:
        if not existing.is_dir():
            raise _unfit(target, f"{existing} is not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise _unfit(target, f"{existing} is not writable by you")
        return
    if target.parent == target or target.is_mount():
        raise _unfit(target, "it is a mount point, which cannot be renamed over")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise _unfit(target, f"{target.parent} is not writable by you")
    if target.is_dir() and target in (here := Path.cwd(), *here.parents):
        raise _unfit(target, "it contains the current directory")
    if target.is_dir() == is_file:
        found, wanted = ("directory", "file") if is_file else ("file", "directory")
        raise TargetExistsError(
            f"the target is a {found}, but the result is a {wanted}",
            [("target", target)],
            hint="choose another name",
        )
    if not overwrite and (is_file or holds_something(target)):
        raise TargetExistsError(
            "the target exists",
            [("target", target)],
            hint="pass --overwrite to replace it once the new one is complete",
        )


def _check_apart(target: Path, source: Path) -> None:
    if target == source:
        raise _unfit(target, "it is the source; the source is never changed")
    if source in target.parents and target.exists():
        raise _unfit(target, f"it is part of the source {source}, which is never changed")
    if target in source.parents and target.exists():
        raise _unfit(target, f"replacing it would remove the source {source}")


def _unfit(target: Path, reason: str) -> TargetError:
    return TargetError(
        "the target cannot be written",
        [("target", target), ("reason", reason)],
        hint="choose another target",
    )


def holds_something(target: Path) -> bool:
    """Whether renaming over ``target`` would lose anything."""
    if target.is_dir():
        return next(target.iterdir(), None) is not None
    return target.exists()
