"""JSON that a file holds, however it got there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcpconv.core.errors import FormatError
from dcpconv.stores.local import read_regular


def read_json(
    path: Path, *, most: int = 1 << 26, hook: Callable[[dict[str, Any]], object] | None = None
) -> object:
    """What a regular file of JSON holds.

    Args:
        path: The file.
        most: Bytes that it may have.
        hook: What to make of an object as soon as it is read, where many would take memory.

    Raises:
        FormatError: It cannot be read, is no JSON, or is larger.
    """
    try:
        value: object = json.loads(read_regular(path, most=most), object_hook=hook)
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError("file is not JSON", [("file", path), ("reason", error)]) from error
    return value
