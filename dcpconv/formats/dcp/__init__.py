"""PyTorch Distributed Checkpoint: a ``.metadata`` pickle and ``*.distcp`` files of item frames."""

from __future__ import annotations

from dcpconv.formats.dcp.directory import explain, is_dcp, read_catalog
from dcpconv.formats.dcp.items import OpaqueObject
from dcpconv.formats.dcp.metadata import METADATA_FILE
from dcpconv.formats.dcp.outline import outline

__all__ = ["METADATA_FILE", "OpaqueObject", "explain", "is_dcp", "outline", "read_catalog"]
