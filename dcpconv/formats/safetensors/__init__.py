"""Safetensors: one file, or shard files with an index, or the slices that ranks saved."""

from __future__ import annotations

from dcpconv.formats.safetensors.files import (
    MAX_FILE_SIZE,
    is_hf,
    one_file,
    outline,
    read_catalog,
)
from dcpconv.formats.safetensors.metadata import SIDE_FILE, from_side_file, to_side_file

__all__ = [
    "MAX_FILE_SIZE",
    "SIDE_FILE",
    "from_side_file",
    "is_hf",
    "one_file",
    "outline",
    "read_catalog",
    "to_side_file",
]
