"""How much a loader stages: every tile that it takes while a test runs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from dcpconv.loading import reading


def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every staging buffer that is asked for from now on."""
    sizes: list[int] = []
    tile = reading._Desk._tile

    def counted(self: Any, use: str, nbytes: int, **options: Any) -> Tensor:
        sizes.append(nbytes)
        return tile(self, use, nbytes, **options)

    monkeypatch.setattr(reading._Desk, "_tile", counted)
    return sizes
