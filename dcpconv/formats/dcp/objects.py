"""What stands for a value that is no tensor and was not read."""

from __future__ import annotations

from dataclasses import dataclass

from dcpconv.core.catalog import Extent


@dataclass(frozen=True, slots=True)
class OpaqueObject:
    """A value that was not read: it is there, and why we leave it alone."""

    extent: Extent
    reason: str
