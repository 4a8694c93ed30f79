"""PyTorch Distributed Checkpoint: a ``.metadata`` pickle and ``*.distcp`` files of item frames."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcpconv.formats.dcp.directory import explain, is_dcp, read_catalog
    from dcpconv.formats.dcp.objects import OpaqueObject
    from dcpconv.formats.dcp.writing import outline

__all__ = ["OpaqueObject", "explain", "is_dcp", "outline", "read_catalog"]

_HOMES: Mapping[str, str] = {
    "OpaqueObject": "objects",
    "explain": "directory",
    "is_dcp": "directory",
    "outline": "writing",
    "read_catalog": "directory",
}


def __getattr__(name: str) -> Any:
    """Reading and writing are imported when they are asked for: few commands do both."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
