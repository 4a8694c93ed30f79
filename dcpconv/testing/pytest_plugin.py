"""The pytest fixture ``assert_covers``; pytest finds it wherever dcpconv is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dcpconv.plan.coverage import Coverage


@pytest.fixture(name="assert_covers", scope="session")
def fixture() -> Callable[..., Coverage]:
    """``dcpconv.testing.assert_covers``: does this model still take that checkpoint?"""
    # Imported late: every pytest run of an environment with dcpconv loads this module.
    from dcpconv.testing import assert_covers  # noqa: PLC0415

    return assert_covers
