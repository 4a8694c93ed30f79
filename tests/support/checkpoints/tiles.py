"""How much a loader stages: every tile that it takes while a test runs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from dcpconv.loading.staging import Desk


def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every staging buffer that is asked for from now on."""
    sizes: list[int] = []
    tile = Desk.tile

    def counted(self: Any, use: str, nbytes: int, **options: Any) -> Tensor:
        sizes.append(nbytes)
        return tile(self, use, nbytes, **options)

    monkeypatch.setattr(Desk, "tile", counted)
    return sizes
