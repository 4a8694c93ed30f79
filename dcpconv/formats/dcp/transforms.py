"""Items that went through a stream transform on their way to disk: zstd is undone, no other."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from dcpconv.core.errors import FormatError


def require_unpackable(transform: object, about: Iterable[tuple[str, object]]) -> None:
    """Raises for items that cannot be had without the code that wrote them.

    Raises:
        FormatError: They are encrypted, or compressed by something that is not here.
    """
    listed = transform if isinstance(transform, (list, tuple)) else [transform]
    names = ", ".join(str(name)[:80] for name in listed)
    is_zstd = names == "stream.zstd/1" or names.startswith("stream.zstd/1.")
    if is_zstd and importlib.util.find_spec("zstandard") is not None:
        return
    raise FormatError(
        "items are compressed or otherwise transformed",
        [*about, ("transform", names)],
        hint="pip install zstandard, then run this again"
        if is_zstd
        else "only the code that wrote them can read them; load and save it with that",
        kind="transformed",
    )
