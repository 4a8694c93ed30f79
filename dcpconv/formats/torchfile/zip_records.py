"""The zip container of a ``torch.save`` file: where each record's bytes lie, and where to put them.

Only what torch itself uses: stored records, no compression, no encryption, zip64 where sizes need
it.  A record is found and placed without touching its payload, so sizes never matter.

Source:
    PKWARE APPNOTE 6.3.10 sections 4.3 to 4.5; torch ``caffe2/serialize/inline_container.cc``
    (records below one directory of any name, payloads aligned by an ``FB`` extra field).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.later import LOCAL, LOCAL_SIG, Later, Record
from dcpconv.stores.ranged import Frame

ReadAt = Callable[[int, int], bytes]
"""``read(offset, nbytes)``: bytes of the archive, fewer only at its end."""

_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL_SIG, _END_SIG = b"PK\x01\x02", b"PK\x05\x06"
_END64_SIG, _LOCATOR_SIG = b"PK\x06\x06", b"PK\x06\x07"
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_HAS_FOOT, _FOOT, _FOOT64 = 8, 16, 24
_ZIP64_ID = 1
_PADDING_ID = b"FB"

_PAGE: Final = 4096
"""Bytes read at once around a header: both ends of a small archive come in two reads."""

_CUT_SHORT: Final = "the file was cut short or altered; fetch or save it again"


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of one archive.

    Attributes:
        where: Name for error messages.
        nbytes: Length of the archive.
        names: Record names without the archive's own directory, in directory order.
    """

    where: str
    nbytes: int
    _read: ReadAt
    _prefix: bytes
    _records: Mapping[str, Record]
    _later: Later | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Record names without the archive's own directory, in directory order."""
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
            return self._later.extent(name, record, self._extent)
        return self._extent(name, record)

    def _extent(self, name: str, record: Record) -> tuple[int, int]:
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
    read: ReadAt, nbytes: int, where: str, *, expect: Callable[[Frame], None] | None = None
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
    records: dict[str, Record] = {}
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
            foot = _FOOT64 if size >= _MAX32 or header >= _MAX32 else _FOOT
        records[name] = Record(header, size, limit, foot)

    later = Later(expect, prefix, where) if expect is not None else None
    archive = Archive(where, nbytes, read, prefix, records, later)
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise FormatError(
            "tensors are not stored little-endian",
            [("file", where), ("found", repr(archive.read("byteorder")[:16]))],
            hint="load and save it again with torch on a little-endian machine",
        )
    return archive


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
    for length in (_PAGE, _END.size + _MAX16):  # torch writes no comment after the end record
        tail = read(max(0, nbytes - length), min(nbytes, length))
        at = tail.rfind(_END_SIG)
        if at >= 0:
            break
    if at < 0 or at + _END.size > len(tail):
        raise FormatError(
            "file has no zip directory at its end",
            [("file", where), ("expected", "an end record"), ("found", f"none in {nbytes} bytes")],
            hint=_CUT_SHORT,
        )
    end_offset = nbytes - len(tail) + at
    *_, count, size, offset, _ = _END.unpack_from(tail, at)

    locator_offset = end_offset - _LOCATOR.size
    locator = read(locator_offset, _LOCATOR.size) if locator_offset >= 0 else b""
    if locator[:4] == _LOCATOR_SIG:
        end_offset = _LOCATOR.unpack(locator)[2]
        end64 = read(end_offset, _END64.size) if end_offset < nbytes else b""
        if end64[:4] != _END64_SIG or len(end64) < _END64.size:
            raise FormatError(
                "zip64 end record is missing",
                [("file", where), ("expected", f"at byte {end_offset}")],
                hint=_CUT_SHORT,
            )
        *_, count, size, offset = _END64.unpack(end64)

    if offset + size > end_offset or count * _CENTRAL.size > size:
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
        fixed = directory[position : position + _CENTRAL.size]
        if len(fixed) < _CENTRAL.size or fixed[:4] != _CENTRAL_SIG:
            raise FormatError(
                "zip directory is damaged",
                [("file", where), ("at", f"byte {position} of the directory")],
                hint=_CUT_SHORT,
            )
        fields = _CENTRAL.unpack(fixed)
        flags, method, packed, size = fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
        position += _CENTRAL.size
        name = directory[position : position + name_length]
        position += name_length
        extra = directory[position : position + extra_length]
        position += extra_length + comment_length

        wide = _zip64_fields(extra)
        try:
            size = next(wide) if size == _MAX32 else size
            packed = next(wide) if packed == _MAX32 else packed
            header = next(wide) if header == _MAX32 else header
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
        if kind == _ZIP64_ID:
            for at in range(position, position + length - 7, 8):
                yield int.from_bytes(extra[at : at + 8], "little")
            return
        position += length


@dataclass(slots=True)
class ArchiveLayout:
    """Places records one after another and writes down every byte that is not payload.

    Deterministic: no times, no ids.  Payload checksums are 0, because the bytes are not at hand
    and torch never looks (``torch.serialization.set_crc32_options`` and ``skip_data`` rely on it).

    Attributes:
        position: Where the next record's header goes; after ``finish``, the archive's length.
        literals: ``(offset, bytes)``; padding is left out, it is zeros.
    """

    position: int = 0
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    _directory: list[bytes] = field(default_factory=list)

    def add(self, name: str, data: bytes) -> None:
        """Place a small record together with its bytes."""
        self._header(name, len(data), zlib.crc32(data), modulus=1, residue=0)
        self._literal(data)

    def add_payload(self, name: str, nbytes: int, *, modulus: int, residue: int) -> int:
        """Place a record whose bytes come from elsewhere; returns their offset.

        Args:
            name: Record name below the archive's directory.
            nbytes: Length of the payload.
            modulus: The payload starts where ``offset % modulus == residue``; at most 32768, so
                that the padding fits an extra field.
            residue: See ``modulus``.
        """
        self._header(name, nbytes, 0, modulus=modulus, residue=residue)
        offset = self.position
        self.position += nbytes
        return offset

    def finish(self) -> None:
        """Place the directory and the end record."""
        offset, directory = self.position, b"".join(self._directory)
        count, size = len(self._directory), len(directory)
        self._literal(directory)
        if count >= _MAX16 or size >= _MAX32 or offset >= _MAX32:
            end64 = _END64.pack(
                _END64_SIG, _END64.size - 12, 45, 45, 0, 0, count, count, size, offset
            )
            locator = _LOCATOR.pack(_LOCATOR_SIG, 0, self.position, 1)
            self._literal(end64 + locator)
        short = min(count, _MAX16)
        self._literal(
            _END.pack(_END_SIG, 0, 0, short, short, min(size, _MAX32), min(offset, _MAX32), 0)
        )

    def _literal(self, data: bytes) -> None:
        self.literals.append((self.position, data))
        self.position += len(data)

    def _header(self, name: str, nbytes: int, crc: int, *, modulus: int, residue: int) -> None:
        raw_name, header = f"archive/{name}".encode(), self.position
        is_wide = nbytes >= _MAX32
        short = _MAX32 if is_wide else nbytes
        version = 45 if is_wide or header >= _MAX32 else 20
        extra = struct.pack("<2H2Q", _ZIP64_ID, 16, nbytes, nbytes) if is_wide else b""
        start = header + LOCAL.size + len(raw_name) + len(extra)
        padding = 0
        if start % modulus != residue:
            padding = (residue - start - 4) % modulus
            extra += _PADDING_ID + struct.pack("<H", padding)
        local = LOCAL.pack(
            LOCAL_SIG, version, 0, 0, 0, 0, crc, short, short, len(raw_name), len(extra) + padding
        )
        self._literal(local + raw_name + extra)
        self.position += padding

        wide = [nbytes, nbytes] if is_wide else []
        wide += [header] if header >= _MAX32 else []
        extra = struct.pack(f"<2H{len(wide)}Q", _ZIP64_ID, 8 * len(wide), *wide) if wide else b""
        self._directory.append(
            _CENTRAL.pack(
                _CENTRAL_SIG,
                *(version, version, 0, 0, 0, 0, crc, short, short),
                *(len(raw_name), len(extra), 0, 0, 0, 0, min(header, _MAX32)),
            )
            + raw_name
            + extra
        )
