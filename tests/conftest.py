"""Options of the whole suite."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("dcpconv", deadline=None)  # no test measures time
settings.load_profile("dcpconv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=int,
        default=300,
        metavar="N",
        help="mutated inputs per form in tests/hostile/test_fuzz.py",
    )
    parser.addoption(
        "--faults",
        type=int,
        default=60,
        metavar="N",
        help="faults between us and a bucket in tests/hostile/test_store_faults.py",
    )


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> int:
    """How many faults are injected."""
    return int(request.config.getoption("--faults"))


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> int:
    """How many inputs a fuzzer tries."""
    return int(request.config.getoption("--fuzz"))
