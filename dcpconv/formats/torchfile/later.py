"""Headers of a zip's records that are looked at when the payload is read, and not before.

Source: PKWARE APPNOTE 6.3.10 section 4.3.7 (local file header), 4.3.9 (data descriptor).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dcpconv.core.errors import FormatError
from dcpconv.stores.ranged import Frame

LOCAL: Final = struct.Struct("<4s5H3L2H")
"""A record's own header."""
LOCAL_SIG: Final = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Record:
    """A record as the directory lists it.

    Attributes:
        header: Where its own header begins.
        nbytes: Length of the payload.
        limit: The next header, or the directory: no byte of this record lies there.
        foot: Bytes that follow the payload: its checksum and lengths once more, or none.
    """

    header: int
    nbytes: int
    limit: int
    foot: int


@dataclass(slots=True)
class Later:
    """Headers of payloads that are looked at when the payload is read: a round trip for each would
    take longer than all the rest.  Until then the payload is taken to end where the next header
    begins, or its foot; the first record shows whether its writer did so.
    """

    expect: Callable[[Frame], None]
    prefix: bytes
    where: str
    is_so: bool | None = None

    def extent(
        self, name: str, record: Record, look: Callable[[str, Record], tuple[int, int]]
    ) -> tuple[int, int]:
        """As ``Archive.extent``.

        Raises:
            FormatError: The first record is not what it should be.
        """
        offset = record.limit - record.foot - record.nbytes
        if self.is_so is None:
            found = look(name, record)
            self.is_so = found == (offset, record.nbytes)
            return found
        if not self.is_so:
            return look(name, record)
        raw_name = self.prefix + name.encode()
        length = offset - record.header

        def check(raw: bytes) -> None:
            name_length, extra_length = LOCAL.unpack(raw[: LOCAL.size])[-2:]
            end = LOCAL.size + name_length
            is_sound = raw[:4] == LOCAL_SIG and end + extra_length == length
            if not is_sound or raw[LOCAL.size : end] != raw_name:
                raise FormatError(
                    "record's header is not what the directory says of it",
                    [("file", self.where), ("record", name), ("at", f"byte {record.header}")],
                    hint="copy the file to a disk and try again there: this tells more",
                )

        if length < LOCAL.size + len(raw_name):
            return look(name, record)
        self.expect(Frame(record.header, length, check))
        return offset, record.nbytes
