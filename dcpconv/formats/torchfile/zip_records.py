"""The zip container of a ``torch.save`` file: where each record's bytes lie, and where to put them.

Only what torch itself uses: stored records, no compression, no encryption, zip64 where sizes need
it.  A record is found and placed without touching its payload, so sizes never matter.

Source:
    PKWARE APPNOTE 6.3.10 sections 4.3 to 4.5; torch ``caffe2/serialize/inline_container.cc``
    (records below one directory of any name, payloads aligned by an ``FB`` extra field).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dcpconv.core.errors import FormatError

if TYPE_CHECKING:
    from dcpconv.formats.torchfile.later import Later
    from dcpconv.stores.ranged import Heading

ReadAt = Callable[[int, int], bytes]
"""``read(offset, nbytes)``: bytes of the archive, fewer only at its end."""

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
LOCAL_SIG, CENTRAL_SIG, END_SIG = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64_SIG, LOCATOR_SIG = b"PK\x06\x06", b"PK\x06\x07"
MAX16, MAX32 = 0xFFFF, 0xFFFFFFFF
_HAS_FOOT, _FOOT, _FOOT64 = 8, 16, 24
ZIP64_ID = 1
PADDING_ID = b"FB"

_PAGE: Final = 4096
"""Bytes read at once around a header: both ends of a small archive come in two reads."""

_CUT_SHORT: Final = "the file was cut short or altered; fetch or save it again"


@dataclass(frozen=True, slots=True)
class _Record:
    header: int
    nbytes: int
    limit: int  # the next header, or the directory: no byte of this record lies there
    foot: int  # bytes that follow the payload: its checksum and lengths once more, or none


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of one archive.

    Attributes:
        where: Name for error messages.
        nbytes: Length of the archive.
        names: _Record names without the archive's own directory, in directory order.
    """

    where: str
    nbytes: int
    _read: ReadAt
    _prefix: bytes
    _records: Mapping[str, _Record]
    _later: Later | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """_Record names without the archive's own directory, in directory order."""
        return tuple(self._records)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def extent(self, name: str) -> tuple[int, int]:
        """``(offset, nbytes)`` of a record's payload, from the start of the archive.

        Raises:
            FormatError: There is no such record, or it does not fit where the directory puts it.
        """
        record = self._records.get(name)
        if record is None:
            raise FormatError(
                "record is missing", [("file", self.where), ("expected", name)], hint=_CUT_SHORT
            )
        if self._later is not None and name.startswith("data/"):
            end = record.limit - record.foot
            return self._later.extent(
                self._prefix + name.encode(),
                (record.header, end - record.nbytes, record.nbytes),
                lambda: self._extent(name, record),
            )
        return self._extent(name, record)

    def _extent(self, name: str, record: _Record) -> tuple[int, int]:
        raw = self._read(record.header, LOCAL.size)
        if len(raw) < LOCAL.size or raw[:4] != LOCAL_SIG:
            raise FormatError(
                "record has no header where the directory puts it",
                [("file", self.where), ("record", name), ("at", f"byte {record.header}")],
                hint=_CUT_SHORT,
            )
        name_length, extra_length = LOCAL.unpack(raw)[-2:]
        offset = record.header + LOCAL.size + name_length + extra_length
        if self._read(record.header + LOCAL.size, name_length) != self._prefix + name.encode():
            raise FormatError(
                "record's header has another name than the directory",
                [("file", self.where), ("record", name), ("at", f"byte {record.header}")],
                hint=_CUT_SHORT,
            )
        if offset + record.nbytes > record.limit:
            raise FormatError(
                "record runs into what follows it",
                [
                    ("file", self.where),
                    ("record", name),
                    ("expected", f"end at or before byte {record.limit}"),
                    ("found", f"byte {offset + record.nbytes}"),
                ],
                hint=_CUT_SHORT,
            )
        return offset, record.nbytes

    def read(self, name: str) -> bytes:
        """A whole record; meant for the small ones."""
        offset, nbytes = self.extent(name)
        payload = self._read(offset, nbytes)
        if len(payload) != nbytes:
            raise FormatError(
                "record is cut short",
                [
                    ("file", self.where),
                    ("record", name),
                    ("expected", f"{nbytes} bytes"),
                    ("found", f"{len(payload)} bytes"),
                ],
                hint=_CUT_SHORT,
            )
        return payload


def read_archive(
    read: ReadAt, nbytes: int, where: str, *, expect: Callable[[Heading], None] | None = None
) -> Archive:
    """The directory of one archive, checked; no payload is read.

    Args:
        read: Bytes of the archive by offset from its own start, which may be inside a file.
        nbytes: Length of the archive.
        where: Name for error messages.
        expect: Has a header checked when the payload after it is read.

    Raises:
        FormatError: The end is missing, a record is compressed, encrypted, duplicated, outside the
            archive or on top of another, or the bytes are big-endian.
    """
    read = _paged(read, nbytes)
    directory, directory_offset, count = _find_directory(read, nbytes, where)
    entries = list(_entries(directory, count, where))
    if not entries:
        raise FormatError("zip directory has no entries", [("file", where)], hint=_CUT_SHORT)

    prefix = entries[0][0].split(b"/")[0] + b"/"
    starts = sorted(entry[1] for entry in entries)
    # Reversed, so that of two records at one place the first ends where it starts, and is refused.
    following = dict(reversed([*zip(starts, [*starts[1:], directory_offset], strict=True)]))
    records: dict[str, _Record] = {}
    for raw_name, header, size, has_foot in entries:
        limit = following[header]
        if header + LOCAL.size + len(raw_name) + size > limit:
            raise FormatError(
                "records overlap or lie outside the file",
                [
                    ("file", where),
                    ("record", repr(raw_name)),
                    ("expected", f"{size} bytes between bytes {header} and {limit}"),
                ],
                hint=_CUT_SHORT,
            )
        if not raw_name.startswith(prefix):
            continue
        try:
            name = raw_name[len(prefix) :].decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                "record name is not UTF-8", [("file", where), ("record", repr(raw_name))]
            ) from error
        if name in records:
            raise FormatError("record appears twice", [("file", where), ("record", name)])
        foot = 0
        if has_foot:
            foot = _FOOT64 if size >= MAX32 or header >= MAX32 else _FOOT
        records[name] = _Record(header, size, limit, foot)

    later = None
    if expect is not None:
        from dcpconv.formats.torchfile.later import Later  # noqa: PLC0415 - of a store's objects

        later = Later(expect, where, _frame_of)
    archive = Archive(where, nbytes, read, prefix, records, later)
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise FormatError(
            "tensors are not stored little-endian",
            [("file", where), ("found", repr(archive.read("byteorder")[:16]))],
            hint="load and save it again with torch on a little-endian machine",
        )
    return archive


def _frame_of(raw: bytes) -> tuple[bytes, int]:
    """The name in a record's header, and the length of the header; a name of none is empty."""
    if len(raw) < LOCAL.size or raw[:4] != LOCAL_SIG:
        return b"", 0
    name_length, extra_length = LOCAL.unpack(raw[: LOCAL.size])[-2:]
    end = LOCAL.size + name_length
    return raw[LOCAL.size : end], end + extra_length


def _paged(read: ReadAt, nbytes: int) -> ReadAt:
    """Reads at least a page and keeps the last one: headers lie close together."""
    page_offset, page = 0, b""

    def paged(offset: int, length: int) -> bytes:
        nonlocal page_offset, page
        if not page_offset <= offset <= offset + length <= page_offset + len(page):
            wanted = max(0, min(max(length, _PAGE), nbytes - offset))
            page_offset, page = offset, read(offset, wanted) if wanted else b""
        return page[offset - page_offset :][:length]

    return paged


def _find_directory(read: ReadAt, nbytes: int, where: str) -> tuple[bytes, int, int]:
    """The central directory's bytes, its offset, and how many entries it should hold."""
    tail, at = b"", -1
    for length in (_PAGE, END.size + MAX16):  # torch writes no comment after the end record
        tail = read(max(0, nbytes - length), min(nbytes, length))
        at = tail.rfind(END_SIG)
        if at >= 0:
            break
    if at < 0 or at + END.size > len(tail):
        raise FormatError(
            "file has no zip directory at its end",
            [("file", where), ("expected", "an end record"), ("found", f"none in {nbytes} bytes")],
            hint=_CUT_SHORT,
        )
    end_offset = nbytes - len(tail) + at
    *_, count, size, offset, _ = END.unpack_from(tail, at)

    locator_offset = end_offset - LOCATOR.size
    locator = read(locator_offset, LOCATOR.size) if locator_offset >= 0 else b""
    if locator[:4] == LOCATOR_SIG:
        end_offset = LOCATOR.unpack(locator)[2]
        end64 = read(end_offset, END64.size) if end_offset < nbytes else b""
        if end64[:4] != END64_SIG or len(end64) < END64.size:
            raise FormatError(
                "zip64 end record is missing",
                [("file", where), ("expected", f"at byte {end_offset}")],
                hint=_CUT_SHORT,
            )
        *_, count, size, offset = END64.unpack(end64)

    if offset + size > end_offset or count * CENTRAL.size > size:
        raise FormatError(
            "zip directory does not fit where its end record puts it",
            [
                ("file", where),
                ("expected", f"{count} entries, {size} bytes from byte {offset}"),
                ("found", f"{end_offset} bytes before the end record"),
            ],
            hint=_CUT_SHORT,
        )
    return read(offset, size), offset, count


def _entries(directory: bytes, count: int, where: str) -> Iterator[tuple[bytes, int, int, bool]]:
    """``(name, offset of its header, nbytes, whether a foot follows)`` of every record."""
    position = 0
    for _ in range(count):
        fixed = directory[position : position + CENTRAL.size]
        if len(fixed) < CENTRAL.size or fixed[:4] != CENTRAL_SIG:
            raise FormatError(
                "zip directory is damaged",
                [("file", where), ("at", f"byte {position} of the directory")],
                hint=_CUT_SHORT,
            )
        fields = CENTRAL.unpack(fixed)
        flags, method, packed, size = fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
        position += CENTRAL.size
        name = directory[position : position + name_length]
        position += name_length
        extra = directory[position : position + extra_length]
        position += extra_length + comment_length

        wide = _zip64_fields(extra)
        try:
            size = next(wide) if size == MAX32 else size
            packed = next(wide) if packed == MAX32 else packed
            header = next(wide) if header == MAX32 else header
        except (StopIteration, struct.error):
            raise FormatError(
                "zip64 sizes of a record are missing", [("file", where), ("record", repr(name))]
            ) from None
        if method or flags & 1 or packed != size:
            raise FormatError(
                "record is compressed or encrypted; torch.save stores records as they are",
                [
                    ("file", where),
                    ("record", repr(name)),
                    ("expected", "method 0, stored"),
                    ("found", f"method {method}, {packed} bytes for {size}"),
                ],
                hint="this is not a torch.save file, or another tool packed it again",
            )
        yield name, header, size, bool(flags & _HAS_FOOT)


def _zip64_fields(extra: bytes) -> Iterator[int]:
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == ZIP64_ID:
            for at in range(position, position + length - 7, 8):
                yield int.from_bytes(extra[at : at + 8], "little")
            return
        position += length
