"""Safetensors: one file, or shard files with an index, or the slices that ranks saved."""

from __future__ import annotations

from dcpconv.formats.safetensors.files import (
    MAX_FILE_SIZE,
    is_hf,
    one_file,
    outline,
    read_catalog,
)

__all__ = ["MAX_FILE_SIZE", "is_hf", "one_file", "outline", "read_catalog"]
