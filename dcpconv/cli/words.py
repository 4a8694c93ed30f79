"""Numbers as people read them."""

from __future__ import annotations

import re

from dcpconv.core.errors import DcpconvError
from dcpconv.core.numbers import size

__all__ = ["count", "parse_size", "size"]


def count(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun.

    >>> count(1, "key"), count(2048, "key")
    ('1 key', '2,048 keys')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def parse_size(text: str | None) -> int | None:
    """Bytes from what huggingface_hub also accepts.

    >>> parse_size("5GB"), parse_size("512MiB")
    (5000000000, 536870912)
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise DcpconvError(f"cannot read the size {text!r}", [("expected", "5GB, 512MiB, 1000000")])
    number, unit, binary = found.groups()
    power = " KMGT".index(unit.upper() or " ")
    nbytes = int(float(number) * (1024 if binary else 1000) ** power)
    if nbytes < 1:
        raise DcpconvError("a size must be at least one byte", [("found", text)])
    return nbytes
