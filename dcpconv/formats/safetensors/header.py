"""The header of one safetensors file: what the reference reader refuses is refused here.

Source:
    safetensors 0.8 ``safetensors/src/tensor.rs`` (``read_metadata``, ``HashMetadata``,
    ``TensorInfo``, ``validate``) and serde_json, which reads it: UTF-8 without a mark, numbers that
    are unsigned integers where integers are due, no halves of surrogate pairs, 128 levels.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from dcpconv.core.catalog import Chunk, Extent, TensorEntry
from dcpconv.core.dtypes import BY_SAFETENSORS, DType
from dcpconv.core.errors import FormatError

_LARGEST_HEADER: Final = 100_000_000
"""Bytes; safetensors itself refuses more (``MAX_HEADER_SIZE`` in ``tensor.rs``)."""
_LARGEST_DIM: Final = 1 << 63
"""torch counts elements in 64 bits with a sign."""
_DEEPEST: Final = 100
"""Levels of what a record may hold besides; the reference stops at 128."""
_KNOWN: Final = frozenset({"dtype", "shape", "data_offsets"})
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")

_Record = tuple[int, int, str, DType, tuple[int, ...]]
"""Begin, end, key, element type, shape: sorted as it is, it is in the order of the bytes."""


def parse_header(
    read: Callable[[int, int], bytes], size: int, where: object
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Offset of the first tensor byte and the JSON header of one file.

    Args:
        read: ``(offset, nbytes) -> bytes``; of a file here or behind a network.
        size: Bytes in the file.
        where: What errors call the file.

    Raises:
        FormatError: The header is absent, absurdly long, or no JSON object.
    """
    if size < 8:
        raise FormatError(
            "file is shorter than a safetensors header",
            [("file", where), ("found", f"{size} bytes")],
        )
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > _LARGEST_HEADER or 8 + length > size:
        raise FormatError(
            "file is shorter than its header says"
            if length <= _LARGEST_HEADER
            else "file is no safetensors file",
            [("file", where), ("header", f"{length} bytes"), ("found", f"{size} bytes in all")],
            hint="the download was interrupted, or this is a pointer of Git LFS; fetch it again",
        )
    try:
        header = _parse(read(8, length))
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(
            "the safetensors header cannot be read", [("file", where), ("because", error)]
        ) from None
    return 8 + length, header


def _parse(data: bytes) -> dict[str, dict[str, Any]]:
    if not data.startswith(b"{"):
        raise ValueError(f"it begins with {data[:4]!r}, not with {{")
    text = data.decode("utf-8")
    header = json.loads(
        text,
        object_pairs_hook=_without_duplicates,
        parse_int=_whole,
        parse_float=_finite,
        parse_constant=_no_number,
    )
    if _HALF_OF_A_PAIR.search(text):
        _require_whole_text(header)
    metadata = header.get("__metadata__")
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise TypeError("__metadata__ holds something else than strings")
    return header  # type: ignore[no-any-return]  # it begins with a brace


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice!r} is listed twice")
    return record


def _whole(text: str) -> int | float:
    # "-0" is a number with a fraction to the reference reader.
    return float(text) if text.startswith("-") else int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number that fits")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _require_whole_text(value: object) -> None:
    """A key or text with half of a surrogate pair cannot be written anywhere."""
    ahead = [value]
    while ahead:
        node = ahead.pop()
        if isinstance(node, str):
            node.encode("utf-8")
        elif isinstance(node, dict):
            ahead.extend((*node.keys(), *node.values()))
        elif isinstance(node, list):
            ahead.extend(node)


def parse_entries(
    header: Mapping[str, dict[str, Any]], start: int, size: int, name: str, where: object
) -> list[TensorEntry]:
    """The tensors that a header lists, in the order of their bytes.

    Nothing is built for a file whose bytes are not accounted for: a header can list a million
    tensors in one place.

    Raises:
        FormatError: A record is malformed, of an unknown type, or the bytes leave a hole, overlap
            or end beyond the file.
    """
    records = [
        _record(key, record, where) for key, record in header.items() if key != "__metadata__"
    ]
    records.sort(key=lambda record: record[:2])
    position = 0
    for begin, end, key, _, _ in records:
        if begin != position:
            raise FormatError(
                "tensors overlap or leave a hole",
                [
                    ("file", where),
                    ("key", key),
                    ("expected", f"byte {start + position}, found {start + begin}"),
                ],
            )
        position = end
    if start + position != size:
        raise FormatError(
            "file is shorter than its header says"
            if start + position > size
            else "file is longer than its header says",
            [("file", where), ("expected", f"{start + position:,} bytes, found {size:,}")],
            hint="the download was interrupted; fetch this shard file again",
        )
    return [
        TensorEntry(
            key,
            dtype,
            shape,
            (Chunk((0,) * len(shape), shape, Extent(name, start + begin, end - begin)),),
        )
        for begin, end, key, dtype, shape in records
    ]


def _record(key: str, record: object, where: object) -> _Record:
    try:
        return _checked(key, record)
    except KeyError as error:
        raise FormatError(
            "a tensor's record is incomplete, or its dtype is one torch cannot hold",
            [("file", where), ("key", key), ("lacks", error)],
        ) from None
    except (TypeError, ValueError) as error:
        raise FormatError(
            "a tensor's record is malformed", [("file", where), ("key", key), ("why", error)]
        ) from None


def _checked(key: str, record: object) -> _Record:
    if not isinstance(record, dict):
        raise TypeError("it is no object")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if len(record) > len(_KNOWN):
        _require_shallow([value for name, value in record.items() if name not in _KNOWN])
    if not isinstance(dtype, str):
        raise TypeError("dtype is no text")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise TypeError("shape and data_offsets must be lists, the second of two numbers")
    numel, known = 1, BY_SAFETENSORS[dtype]
    for length in shape:
        # bool is an int to Python, and 2.0 is none to the reference reader.
        if type(length) is not int or not length < _LARGEST_DIM:
            raise ValueError(f"shape holds {length!r:.40}")
        numel *= length
        if numel >= 2 * _LARGEST_DIM:
            raise ValueError("shape has more elements than can be counted")
    if known.packed > 1:
        if not shape or shape[-1] % known.packed:
            raise ValueError(f"shape {shape!r:.200} ends within a byte")
        shape, numel = [*shape[:-1], shape[-1] // known.packed], numel // known.packed
    begin, end = offsets
    if type(begin) is not int or type(end) is not int:
        raise ValueError(f"data_offsets are {begin!r:.40} and {end!r:.40}")
    if numel * known.itemsize != end - begin:
        raise ValueError(f"shape {shape!r:.200} does not take {end - begin} bytes")
    return begin, end, key, known, tuple(shape)


def _require_shallow(level: list[object]) -> None:
    for _ in range(_DEEPEST):
        level = [
            item
            for node in level
            if isinstance(node, (list, dict))
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")
