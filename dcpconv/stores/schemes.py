"""Names that are no paths of this machine: what is not served is refused, and never made a path.

``Path("s3://bucket/x")`` is the directory ``x`` in a directory named ``s3:``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from dcpconv.core.errors import DcpconvError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)")
"""Of two letters and more, as a drive has one; a ``Path`` has lost one of two slashes."""

_HUB = "hf"


class SchemeError(DcpconvError, ValueError):
    """The name is a URL of a store that is not read or written."""


def refuse_scheme(name: str | os.PathLike[str]) -> None:
    """Raises for what is neither a path here nor a name of a model on a hub.

    Raises:
        SchemeError: It has a scheme, such as ``s3://`` or ``file://``.
    """
    text = os.fspath(name)
    found = _SCHEME.match(text)
    if found is None or found[1] == _HUB or (found[2] == "/" and Path(text).exists()):
        return
    hint = "copy it to a disk first, and name the path; hf://org/name is read from a hub"
    if found[1].lower() == "file":
        local = text[found.end(1) + 1 :].removeprefix("//").removeprefix("localhost")
        hint = f"name the path itself: {local}"
    raise SchemeError(
        f"{found[1]}:// is no place that dcpconv reads or writes",
        [("found", text), ("expected", "a path, or hf://org/name to read from")],
        hint=hint,
    )
