"""Sharded models of one naming take checkpoints of another, each rank its shards only."""

from __future__ import annotations

import pytest

from support.worlds import pair_scenes, state_space_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.pair_scenes import SCENES, prepare


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    sources = tmp_path_factory.mktemp("sources")
    prepare(sources)
    return launch(pair_scenes.__file__, 2, sources, timeout_s=300)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    sources = tmp_path_factory.mktemp("states")
    prepare(sources, state_space_scenes.PAIRS)
    return launch(state_space_scenes.__file__, 2, sources, timeout_s=300)


@pytest.mark.parametrize("scene", state_space_scenes.SCENES[2])
def test_every_rank_gets_its_shards_of_states(states: list[dict[str, Outcome]], scene: str) -> None:
    for rank in states:
        assert not rank[scene].error, rank[scene].text


@pytest.mark.parametrize("scene", SCENES[2])
def test_every_rank_gets_its_shards(world: list[dict[str, Outcome]], scene: str) -> None:
    for rank in world:
        assert not rank[scene].error, rank[scene].text
