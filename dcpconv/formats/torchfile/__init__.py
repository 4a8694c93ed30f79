"""Files of ``torch.save``: one, a directory of shard files, or Meta's model-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcpconv.formats.torchfile.files import (
        alone_in,
        is_one_in_a_directory,
        is_torch_file,
        read_catalog,
    )
    from dcpconv.formats.torchfile.writing import outline

__all__ = ["alone_in", "is_one_in_a_directory", "is_torch_file", "outline", "read_catalog"]

_HOMES: Mapping[str, str] = {
    "alone_in": "files",
    "is_one_in_a_directory": "files",
    "is_torch_file": "files",
    "outline": "writing",
    "read_catalog": "files",
}


def __getattr__(name: str) -> Any:
    """Reading and writing are imported when they are asked for: few commands do both."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
