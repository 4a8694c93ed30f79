"""What files of a DCP are called."""

from __future__ import annotations

from typing import Final

METADATA_FILE: Final = ".metadata"
"""What stands for the whole: a directory without it is no checkpoint, or not yet."""
