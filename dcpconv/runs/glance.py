"""What the two ends of a file say: whether its bytes are of the form that its name promises.

Costs one open and a few reads of bounded size per file, whatever its length.  A file that was cut
short lacks its end, and a file of zeros its beginning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final

from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.zip_records import Archive, ReadAt, read_archive
from dcpconv.runs.errors import in_one_line
from dcpconv.runs.listing import Listing

_HEADER: Final = 1 << 20
"""Bytes of a safetensors header that a glance reads; a shard file's is far below."""

_LARGEST_HEADER: Final = 100_000_000
"""Bytes; safetensors refuses more."""

_DIRECTORY: Final = 1 << 26
"""Bytes of a zip directory: half a million records."""

_PICKLE: Final = 1 << 20
"""Bytes at the end of a pickle that are looked through."""

_ZIP: Final = b"PK\x03\x04"
_LEGACY: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""``torch/serialization.py`` ``MAGIC_NUMBER``, pickled: the form before zip archives."""

_TRAINERS = re.compile(
    r"(pytorch_model|adapter_model|optimizer|scheduler|scaler|training_args|random_states_).*"
)
"""Names under which trainers call ``torch.save``; other ``.bin`` and ``.pkl`` may be anything."""

_PARAMETER = re.compile(r"(?:^|\.)(?:weight|bias)$")


def glance(listing: Listing, name: str, *, strict: bool = False) -> Iterator[str]:
    """What is wrong with one file, as far as its ends tell.

    Args:
        listing: The step.
        name: The file; an empty one is not opened.
        strict: Take every ``.bin`` for a file of ``torch.save``, not only those of trainers.
    """
    nbytes = listing.files[name]
    base = name.rpartition("/")[2]
    suffix = base[base.rfind(".") :] if "." in base else ""
    if suffix in {".bin", ".pkl"} and not (_TRAINERS.fullmatch(base) or strict):
        return
    look = _LOOKS.get(suffix)
    if look is None or nbytes == 0:
        return
    try:
        with listing.opened(name) as read:
            yield from (f"{name}: {problem}" for problem in look(read, nbytes))
    except (OSError, FormatError) as error:
        reason = error.headline if isinstance(error, FormatError) else in_one_line(error)
        yield f"{name}: {reason}"


def pickle_of(listing: Listing, name: str) -> bytes:
    """The end of the ``data.pkl`` in a file of ``torch.save``; empty where there is none."""
    try:
        with listing.opened(name) as read:
            offset, nbytes = _archive(read, listing.files[name]).extent("data.pkl")
            length = min(nbytes, _PICKLE)
            return read(offset + nbytes - length, length)
    except (OSError, FormatError):
        return b""


def _safetensors(read: ReadAt, nbytes: int) -> Iterator[str]:
    length = int.from_bytes(read(0, 8), "little")
    if nbytes < 8 or length < 2 or length > _LARGEST_HEADER:
        yield "is not a safetensors file"
        return
    if 8 + length > nbytes:
        yield f"was cut short: its header takes {length} bytes, the file has {nbytes}"
        return
    if length > _HEADER:
        if read(8, 1) != b"{":
            yield "is not a safetensors file"
        return
    try:
        header = json.loads(read(8, length))
        rows = {key: row for key, row in header.items() if key != "__metadata__"}
        end = max((int(row["data_offsets"][1]) for row in rows.values()), default=0)
        empty = [key for key, row in rows.items() if is_emptied(key, tuple(row["shape"]))]
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        yield "its header is not one of safetensors"
        return
    if 8 + length + end != nbytes:
        yield f"its tensors end at byte {8 + length + end}, the file has {nbytes}"
    yield from emptied(empty)


def emptied(keys: list[str]) -> Iterator[str]:
    """The problem that these parameters have no elements.

    Source: DeepSpeed 0.19 ``runtime/zero/partition_parameters.py``: under stage 3 a parameter that
    is not gathered has the shape ``[0]``, and so it is saved.
    """
    if keys:
        which = f"{keys[0]} has" if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more have"
        yield f"{which} no elements: saved under ZeRO-3 without gathering"


def is_emptied(key: str, shape: tuple[int, ...]) -> bool:
    """Whether stage 3 left this; buffers and quantisers' indices may well be empty."""
    if "lora_" in key:
        return 0 in shape
    return shape == (0,) and _PARAMETER.search(key) is not None


def _archive(read: ReadAt, nbytes: int) -> Archive:
    def bounded(offset: int, wanted: int) -> bytes:
        if wanted > _DIRECTORY:
            raise FormatError("zip directory is too large to be one of torch.save")
        return read(offset, wanted)

    try:
        archive = read_archive(bounded, nbytes, "")
    except FormatError:
        raise
    except (ValueError, LookupError, OverflowError) as error:
        raise FormatError("zip directory is damaged") from error
    if not archive.names:
        raise FormatError("zip directory has no entries")
    return archive


def _torch(read: ReadAt, nbytes: int) -> Iterator[str]:
    start = read(0, len(_LEGACY))
    if start == _LEGACY:
        return
    if not start.startswith(_ZIP):
        yield "was not written by torch.save" if any(start) else "is zeros at its beginning"
        return
    archive = _archive(read, nbytes)
    if "data.pkl" not in archive:
        yield "is a zip file, but not one of torch.save"


def _pickle(read: ReadAt, nbytes: int) -> Iterator[str]:
    if read(0, 1) != b"\x80":
        yield from _torch(read, nbytes)
    elif read(nbytes - 1, 1) != b".":
        yield "was cut short: it is no whole pickle"


_LOOKS: Final = {
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
    ".bin": _torch,
    ".pkl": _pickle,
}
