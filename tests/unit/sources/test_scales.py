"""stated_block(): what configs say of the size of blocks."""

from __future__ import annotations

from typing import Any

import pytest

from dcpconv.sources.scales import stated_block

STATED: list[Any] = [
    pytest.param({}, None, id="nothing"),
    pytest.param({"weight_block_size": [128, 64]}, (128, 64), id="finegrained fp8"),
    pytest.param({"weight_block_size": None}, None, id="per tensor"),
    pytest.param({"weight_block_size": [128]}, None, id="no pair"),
    pytest.param({"weight_block_size": [0, 4]}, None, id="no size"),
    pytest.param({"config_groups": {"0": {"weights": None}}}, None, id="weights as they are"),
]
BLOCK = {"weights": {"strategy": "block", "block_structure": [128, 64]}}
GROUP = {"weights": {"strategy": "group", "group_size": 32}}
ROWS = {"weights": {"strategy": "channel"}}
GROUPS: list[Any] = [
    pytest.param([BLOCK], (128, 64), id="blocks"),
    pytest.param([GROUP], (1, 32), id="groups"),
    pytest.param([ROWS], None, id="rows"),
    pytest.param([BLOCK, BLOCK], (128, 64), id="twice the same"),
    pytest.param([BLOCK, GROUP], None, id="blocks and groups"),
    pytest.param([BLOCK, ROWS], None, id="blocks and rows"),
]


@pytest.mark.parametrize(("stated", "block"), STATED)
def test_a_config_says_it_or_not(stated: dict[str, Any], block: tuple[int, int] | None) -> None:
    assert stated_block({"quantization_config": stated}) == block


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
@pytest.mark.parametrize(("groups", "block"), GROUPS)
def test_groups_say_it_where_all_say_the_same(
    groups: list[Any], block: tuple[int, int] | None, name: str
) -> None:
    assert stated_block({name: {"config_groups": dict(enumerate(groups))}}) == block


def test_no_config_says_nothing() -> None:
    assert stated_block(None) is None
