"""Sharded transformers models take their own published files, each rank its shards only."""

from __future__ import annotations

import pytest

from support.worlds import published_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.published_scenes import SCENES, prepare


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    sources = tmp_path_factory.mktemp("sources")
    prepare(sources)
    return launch(published_scenes.__file__, 2, sources, timeout_s=300)


@pytest.mark.parametrize("scene", SCENES[2])
def test_every_rank_gets_its_shards(world: list[dict[str, Outcome]], scene: str) -> None:
    for rank in world:
        assert not rank[scene].error, rank[scene].text


@pytest.mark.parametrize("scene", [name for name in SCENES[2] if name.endswith("/fsdp2/all")])
def test_a_rank_reads_the_bytes_of_its_shards(world: list[dict[str, Outcome]], scene: str) -> None:
    first, second = (rank[scene].value for rank in world)
    assert first["read"] == first["bytes"]
    assert second["read"] == second["bytes"]
    assert 0 < second["bytes"] <= first["bytes"] < first["bytes"] + second["bytes"]
