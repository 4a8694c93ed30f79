"""Where a file goes that one rank writes from its first byte to its last: a disk, or a store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dcpconv.conversion.saving.shares import Owned
from dcpconv.core.outline import OutFile
from dcpconv.engine.copying import write_error

if TYPE_CHECKING:
    from dcpconv.engine.passing import PassingDigests
    from dcpconv.engine.uploading import Upload, Uploads


class WholeFiles(Protocol):
    """The files that a rank owns, one after another."""

    def append(self, file: Owned, start: int, data: memoryview) -> None:
        """Write the next bytes of a file, of which ``start`` is the first one's offset.

        Raises:
            DcpconvError: They cannot be written.
        """

    def settle(self) -> None:
        """Wait until everything is where it belongs.

        Raises:
            DcpconvError: Something could not be written.
        """

    def give_up(self) -> None:
        """Leave nothing behind of a file that is not whole."""


@dataclass(slots=True)
class OnDisk:
    """Files of a directory; whoever made that removes what is in it.

    Attributes:
        directory: Where they go.
        digests: Take what is written.
        fd: The file that is being written.
    """

    directory: Path
    digests: PassingDigests | None = None
    fd: int = -1

    def append(self, file: Owned, start: int, data: memoryview) -> None:
        path = self.directory / file.name
        nbytes = len(data)
        if self.digests is not None:
            self.digests.file(file.name).take(start, data)
        try:
            if start == 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                path.parent.mkdir(parents=True, exist_ok=True)
                self.fd = os.open(path, flags, 0o666)
            while data:
                data = data[os.write(self.fd, data) :]
            if start + nbytes == file.nbytes:
                os.fsync(self.fd)
                self.give_up()
        except OSError as error:
            raise write_error(error, path) from error

    def settle(self) -> None:
        """Every file was synced when it was whole."""

    def give_up(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class InStore:
    """Objects, sent in parts while the next bytes are gathered."""

    uploads: Uploads
    upload: Upload | None = None

    def append(self, file: Owned, start: int, data: memoryview) -> None:
        if start == 0 or self.upload is None:
            self.upload = self.uploads.open(OutFile(file.name, file.nbytes, (), ()))
        self.upload.expect(start, len(data))
        self.upload.write(data, start)
        if start + len(data) == file.nbytes:
            self.upload.finish()

    def settle(self) -> None:
        self.uploads.settle()

    def give_up(self) -> None:
        self.uploads.stop()
