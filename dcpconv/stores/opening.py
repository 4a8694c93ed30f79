"""Files opened for parsers, which read a few bytes here and there, wherever the file is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dcpconv.stores.local import identity_of, open_regular
from dcpconv.stores.ranged import Frame
from dcpconv.stores.remote import RemotePath

if TYPE_CHECKING:
    from typing_extensions import Self


class OpenFile:
    """A file being read by offset and length, wherever it is.

    Args:
        path: A regular file, or an object of a store.

    Attributes:
        nbytes: Its length.
        identity: What it is.
        expect: Has bytes checked when what follows them is read; ``None`` where a look costs
            nothing.

    Raises:
        OSError: It cannot be opened.
        FormatError: It is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        if isinstance(path, RemotePath):
            self._ranged = path.ranged
            self.identity = path.identity()
            self.expect: Callable[[Frame], None] | None = self._ranged.expect
        else:
            self._fd = open_regular(path)
            self.identity = identity_of(self._fd)
            self.expect = None
        self.nbytes = self.identity[2]

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of it, fewer only at its end."""
        if self._fd < 0:
            return self._ranged.read(offset, nbytes)
        return os.pread(self._fd, nbytes, offset)

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
