"""JSON that a file holds, however it got there."""

from __future__ import annotations

import json
from pathlib import Path

from dcpconv.core.errors import FormatError
from dcpconv.stores.local import read_regular


def read_json(path: Path, *, most: int = 1 << 26) -> object:
    """What a regular file of JSON holds.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        FormatError: It cannot be read, is no JSON, or is larger.
    """
    try:
        value: object = json.loads(read_regular(path, most=most))
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError("file is not JSON", [("file", path), ("reason", error)]) from error
    return value
