"""One conversion at a time for one target: who has locked the staging directory owns it."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from dcpconv.core.errors import TargetExistsError

OWNER = "owner"
"""Name of the file that is locked; it holds a process id."""


def claim(root: Path, target: Path, *, inherits: bool = False) -> int:
    """Create and lock the staging directory; the lock lasts as long as the returned fd.

    The directory and the owner file may be removed by the conversion that is just ending, at any
    point before we hold the lock on a file that others can see; then we try again.

    Args:
        root: The staging directory.
        target: What will be published.
        inherits: Whether this process goes on with what another one has claimed, and is known to
            have let go: it may take the file of an owner where there are no locks.

    Raises:
        TargetExistsError: Another conversion has claimed it.
        OSError: No file can be made there.
    """
    while True:
        with suppress(FileExistsError):  # exist_ok looks again, and finds it gone by then
            root.mkdir()
        is_new = True
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            try:
                fd = os.open(root / OWNER, flags | os.O_EXCL, 0o666)
            except FileExistsError:
                is_new = False
                fd = os.open(root / OWNER, flags, 0o666)
        except FileNotFoundError:
            continue
        except OSError:
            with suppress(OSError):
                root.rmdir()  # nobody has claimed it: it is empty
            raise
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Some network file systems have no locks; whoever created the file owns it then.
                if error.errno == errno.EWOULDBLOCK or not (is_new or inherits):
                    raise _busy(fd, root, target) from error
            if _is_same(fd, root / OWNER):
                os.ftruncate(fd, 0)
                with suppress(OSError):  # for people; a disk without a free byte is told later
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _busy(fd: int, root: Path, target: Path) -> TargetExistsError:
    owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return TargetExistsError(
        "another conversion is writing this target",
        [("target", target), ("process", owner or "unknown"), ("staging", root)],
        hint="wait for it; if it died on another machine, remove the staging directory",
    )


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
