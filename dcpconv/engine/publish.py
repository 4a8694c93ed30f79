"""Make a finished result visible in one step, or leave no trace of it.

Everything is written beside the target in ``.NAME.dcpconv-staging``::

    owner       locked for as long as a conversion lives; holds its process id
    result/     what will become the target
    previous/   the old target, between the two renames of a file system that cannot exchange
    shares/     where the processes meet that write one result together
    faults/     why some of them cannot come

The lock belongs to a file that never becomes part of a result, so that a second converter that
opened it just before the first one published cannot take the published target for a stale one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.errors import DcpconvError, NoSpaceError, TargetExistsError
from dcpconv.engine.copying import write_error
from dcpconv.engine.targets import TargetError, check_target, holds_something
from dcpconv.stores.schemes import refuse_scheme

_PREVIOUS = "previous"
OWNER, RESULT, SHARES, FAULTS = "owner", "result", "shares", "faults"


@dataclass(slots=True)
class Staging:
    """Where a result lives before it is published.

    Attributes:
        path: Existing empty directory to write into.  The one file of a single-file target is
            written there under the target's own name.
        target: Where it will be, symbolic links resolved.
        is_file: Whether the target is one file instead of a directory.
        overwrite: Whether an existing target may be replaced.
        keeping: Whether the staging directory stays when the block ends without ``publish()``, for
            another conversion to go on with.
    """

    path: Path
    target: Path
    is_file: bool
    overwrite: bool
    keeping: bool = False

    def publish(
        self,
        commit: Sequence[tuple[str, bytes]] = (),
        *,
        exchanging: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the commit files, sync everything, and rename the result into place.

        Args:
            commit: ``(relative name, content)``, written in order after all else is on disk.
            exchanging: Called just before ``path`` may become the old target.

        Raises:
            NoSpaceError: The disk is full.
            TargetError: The result cannot be renamed into place.
            TargetExistsError: Something appeared at the target meanwhile.
        """
        _sync_files(self.path)
        for name, data in commit:
            _write_synced(self.path / name, data)
        _sync_directories(self.path)
        check_target(self.target, overwrite=self.overwrite, is_file=self.is_file)
        try:
            self._rename(exchanging)
        except OSError as error:
            raise TargetError(
                "the result cannot be renamed into place",
                [("target", self.target), ("reason", error.strerror)],
                hint="the target is as it was",
            ) from error
        _sync(self.target.parent)

    def _rename(self, exchanging: Callable[[], None]) -> None:
        if self.is_file:
            from dcpconv.engine.manifests import put_file  # noqa: PLC0415 - most are directories

            put_file(self.path / self.target.name, self.target)
            return
        if not holds_something(self.target):
            self.path.replace(self.target)
            return
        exchanging()
        from dcpconv.engine.exchanging import exchange  # noqa: PLC0415 - only --overwrite does

        if exchange(self.path, self.target):
            return  # what lies in the staging directory now is the old target
        previous = self.path.parent / _PREVIOUS
        self.target.rename(previous)
        try:
            self.path.rename(self.target)
        except BaseException:
            previous.rename(self.target)
            raise


def staging_directory(target: Path) -> Path:
    """Where a result is made: beside the target, symbolic links resolved."""
    target = Path(os.path.realpath(target))
    return target.parent / f".{target.name}.dcpconv-staging"


@contextmanager
def staging(
    target: Path,
    *,
    overwrite: bool,
    is_file: bool,
    source: Path | None = None,
    goes_on: Callable[[Path], bool] = lambda _: False,
) -> Iterator[Staging]:
    """Lend a staging directory beside ``target``; it is gone when the block ends.

    Leaving the block without ``publish()``, by an exception or otherwise, leaves the target as it
    was.  What a crashed conversion left behind is removed first.

    Args:
        target: What will be published; parents are created.  A symbolic link is followed: what it
            points to is replaced.  An empty directory counts as absent.
        overwrite: Replace an existing target, which stays whole until the moment it is replaced.
        is_file: Whether the target will be one file instead of a directory.
        source: What is being read, of which nothing is replaced; a new file or directory inside it
            changes nothing of it.
        goes_on: Whether a crashed conversion left something in the staging directory that this one
            goes on with; it is kept then.

    Raises:
        TargetExistsError: The target exists, or another conversion is writing it.
        TargetError: The target cannot be written where it is.
        SchemeError: The target is a URL.
    """
    refuse_scheme(target)
    target = Path(os.path.realpath(target))
    check_target(target, overwrite=overwrite, is_file=is_file, source=source)
    root = staging_directory(target)
    made = [path for path in target.parents if not path.exists()]
    try:
        with _no_room(target):
            _make_directories(target.parent)
            lock = _claim(root, target)
        stage = Staging(root / RESULT, target, is_file=is_file, overwrite=overwrite)
        with _owned(stage, lock):
            if not (stage.path.is_dir() and goes_on(root)):
                _recover(root, target)
            # Another conversion may have finished between the first look and the lock.
            check_target(target, overwrite=overwrite, is_file=is_file, source=source)
            with _no_room(target):
                stage.path.mkdir(exist_ok=True)
            yield stage
    finally:
        for path in made:  # the innermost first; one that holds anything stays
            with suppress(OSError):
                path.rmdir()


@contextmanager
def inherited(target: Path, *, overwrite: bool, is_file: bool) -> Iterator[Staging]:
    """Lend the staging directory of a process that has ended, as ``staging`` lends a new one.

    Raises:
        TargetExistsError: Another conversion has claimed it.
    """
    target = Path(os.path.realpath(target))
    root = staging_directory(target)
    lock = _claim(root, target, inherits=True)
    stage = Staging(root / RESULT, target, is_file=is_file, overwrite=overwrite)
    with _owned(stage, lock):
        yield stage


def clear(target: Path, *, is_over: Callable[[Path], bool]) -> None:
    """Remove what a conversion left that was killed when the target was there, but it had not
    cleaned up yet.  One that is alive keeps its own.

    Args:
        target: Whole, or an old one.
        is_over: Whether nothing in the staging directory is of use any more; it is locked then.
    """
    target = Path(os.path.realpath(target))
    root = staging_directory(target)
    if not root.exists():
        return
    with suppress(TargetExistsError, OSError):
        lock = _claim(root, target)
        with _owned(Staging(root / RESULT, target, is_file=False, overwrite=False), lock) as stage:
            stage.keeping = not is_over(root)


@contextmanager
def _owned(stage: Staging, lock: int) -> Iterator[Staging]:
    """What is locked is gone when the block ends, or kept and free for another conversion."""
    root = stage.path.parent
    try:
        yield stage
    finally:
        if not stage.keeping:
            _recover(root, stage.target)
        shutil.rmtree(root / FAULTS, ignore_errors=True)
        with suppress(OSError):
            (root / OWNER).unlink()
            root.rmdir()
        os.close(lock)


@contextmanager
def _no_room(target: Path) -> Iterator[None]:
    """What it means that no place for a result can be made."""
    try:
        yield
    except DcpconvError:
        raise
    except OSError as error:
        explained = write_error(error, target)
        if isinstance(explained, NoSpaceError):
            raise explained from error
        raise TargetError(
            "the result cannot be written beside its target",
            [("target", target), ("reason", error.strerror)],
            hint="choose a directory that you may write to",
        ) from error


def _claim(root: Path, target: Path, *, inherits: bool = False) -> int:
    """Create and lock the staging directory; the lock lasts as long as the returned fd.

    The directory and the owner file may be removed by the conversion that is just ending, at any
    point before we hold the lock on a file that others can see; then we try again.
    Who ``inherits`` is known to do so, and takes the file of another where there are no locks.
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


def _recover(root: Path, target: Path) -> None:
    """Bring back a target that was moved aside, then remove everything but the lock."""
    previous = root / _PREVIOUS
    if previous.exists() and not target.exists():
        previous.rename(target)
        _sync(target.parent)
    shutil.rmtree(root / SHARES, ignore_errors=True)  # a process that was lost may still be at it
    for name in (RESULT, _PREVIOUS):
        if (root / name).is_dir():
            shutil.rmtree(root / name)


def _make_directories(directory: Path) -> None:
    """Create missing parents, each on disk before the next."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _write_synced(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(error, path) from error


def _sync_files(directory: Path) -> None:
    for path in filter(Path.is_file, sorted(directory.rglob("*"))):
        _sync(path)


def _sync_directories(directory: Path) -> None:
    """Sync every directory below, the innermost first."""
    for path in filter(Path.is_dir, sorted(directory.rglob("*"), reverse=True)):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    """Sync one file or directory; some file systems cannot sync directories, and need not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise write_error(error, path) from error
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise write_error(error, path) from error
    finally:
        os.close(fd)
