"""Adapters merged into the shards of two ranks: the bits of merging the whole model first."""

from __future__ import annotations

import pytest

from support.worlds import adapter_scenes
from support.worlds.adapter_scenes import SCENES, prepare
from support.worlds.dist_worlds import Outcome, launch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    sources = tmp_path_factory.mktemp("sources")
    prepare(sources)
    return launch(adapter_scenes.__file__, 2, sources)


@pytest.mark.parametrize("scene", SCENES[2])
def test_every_rank_gets_its_shards_of_the_sum(world: list[dict[str, Outcome]], scene: str) -> None:
    for rank in world:
        assert not rank[scene].error, rank[scene].text
