"""Headers of a zip's records that are looked at when the payload is read, and not before.

A round trip for each would take longer than all the rest.  Until then a payload is taken to end
where the next header begins, or its own foot does; the first record shows if its writer did so.

Source: PKWARE APPNOTE 6.3.10 sections 4.3.7 (a record's header) and 4.3.9 (its foot); torch's
``caffe2/serialize/inline_container.cc`` writes records one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dcpconv.core.errors import FormatError
from dcpconv.stores.ranged import Heading


@dataclass(frozen=True, slots=True)
class _AsListed:
    """What the header of a record has to say."""

    parse: Callable[[bytes], tuple[bytes, int]]
    where: str
    name: bytes
    offset: int
    nbytes: int

    def __call__(self, raw: bytes) -> None:
        if self.parse(raw) != (self.name, self.nbytes):
            raise FormatError(
                "record's header is not what the directory says of it",
                [("file", self.where), ("record", repr(self.name)), ("at", f"byte {self.offset}")],
                hint="copy the file to a disk and try again there: this tells more",
            )


@dataclass(slots=True)
class Later:
    """What is known of an archive whose headers nobody has looked at.

    Attributes:
        expect: Has bytes checked when what follows them is read.
        where: Name of the archive for error messages.
        parse: The name in a header, and the header's length.
        is_so: Whether payloads lie as they are taken to; ``None`` before the first.
    """

    expect: Callable[[Heading], None]
    where: str
    parse: Callable[[bytes], tuple[bytes, int]]
    is_so: bool | None = None

    def extent(
        self, name: bytes, place: tuple[int, int, int], look: Callable[[], tuple[int, int]]
    ) -> tuple[int, int]:
        """``(offset, nbytes)`` of a payload.

        Args:
            name: Of the record, with the archive's own directory.
            place: Where its header begins, where its payload should, and the payload's length.
            look: Looks at the header.

        Raises:
            FormatError: The first record is not what it should be.
        """
        header, offset, nbytes = place
        if self.is_so is None:
            found = look()
            self.is_so = found == (offset, nbytes)
            return found
        if not self.is_so or offset - header <= len(name):
            return look()

        check = _AsListed(self.parse, self.where, name, header, offset - header)
        self.expect(Heading(header, offset - header, check))
        return offset, nbytes
