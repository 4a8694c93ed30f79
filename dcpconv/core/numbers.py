"""Numbers as people read them."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def size(nbytes: float) -> str:
    """Bytes in a binary unit.

    >>> size(512), size(2469606195)
    ('512 B', '2.30 GiB')
    """
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in _UNITS:
        nbytes /= 1024
        if nbytes < 1024 or unit == _UNITS[-1]:
            break
    return f"{nbytes:.2f} {unit}" if nbytes < 10 else f"{nbytes:.1f} {unit}"
