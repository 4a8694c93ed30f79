"""fp8 weights into the shards of two ranks: whoever reads, the bits are the whole model's."""

from __future__ import annotations

import pytest

from support.worlds import fp8_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.fp8_scenes import SCENES, prepare


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    sources = tmp_path_factory.mktemp("sources")
    prepare(sources)
    return launch(fp8_scenes.__file__, 2, sources)


@pytest.mark.parametrize("scene", [name for name in SCENES[2] if not name.startswith("refused/")])
def test_every_rank_gets_its_shards_of_the_products(
    world: list[dict[str, Outcome]], scene: str
) -> None:
    for rank in world:
        assert not rank[scene].error, rank[scene].text


@pytest.mark.parametrize("scene", [name for name in SCENES[2] if name.endswith("/fp32/all")])
def test_a_rank_reads_less_than_it_gets(world: list[dict[str, Outcome]], scene: str) -> None:
    for rank in world:
        assert rank[scene].value["read"] < rank[scene].value["bytes"]


@pytest.mark.parametrize("scene", [name for name in SCENES[2] if name.startswith("refused/")])
def test_every_rank_refuses_elements_without_factors(
    world: list[dict[str, Outcome]], scene: str
) -> None:
    first, second = (rank[scene] for rank in world)
    assert first.text == second.text
    assert first.error == second.error == "CoverageError"
    assert "21 scaled" in first.text
    assert "dequantize=True" in first.text
