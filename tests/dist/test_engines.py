"""Both engines of ``load_init_weights`` give the same bits, and every rank its own part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from support.worlds import load_scenes, stock_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.stock_scenes import SCENES


class Worlds(dict[int, list[dict[str, Outcome]]]):
    """What was heard in worlds of some size, each launched when the first test asks."""

    def __init__(self, sources: Path) -> None:
        super().__init__()
        self.sources = sources

    def __missing__(self, ranks: int) -> list[dict[str, Outcome]]:
        self[ranks] = launch(stock_scenes.__file__, ranks, self.sources)
        return self[ranks]


NAMED = "RMSNorm (norm) has state dict hooks"


def other_values(directory: Path) -> None:
    """A copy of the checkpoint with another value in one small tensor."""
    target = directory / "other-values"
    target.mkdir()
    for file in (directory / "hf-untied").iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        weights = load_file(file)
        if "model.norm.weight" in weights:
            weights["model.norm.weight"] += 1
        save_file(weights, target / file.name, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    sources = tmp_path_factory.mktemp("sources")
    load_scenes.prepare(sources, SCENES)
    stock_scenes.prepare_experts(sources)
    other_values(sources)
    return Worlds(sources)


def values(worlds: Worlds, ranks: int, scene: str) -> list[Any]:
    found = [world[scene] for world in worlds[ranks]]
    for outcome in found:
        assert not outcome.error, outcome.text
    return [outcome.value for outcome in found]


def failures(worlds: Worlds, scene: str) -> Outcome:
    """How a scene failed: alike on all ranks."""
    found = [world[scene] for world in worlds[2]]
    assert len({(outcome.error, outcome.text) for outcome in found}) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("ranks", "scene"),
    [
        pytest.param(ranks, scene, id=f"{ranks}-{scene}")
        for ranks, scenes in SCENES.items()
        for scene in scenes
        if scene.startswith("stock/")
    ],
)
def test_the_stock_path_gives_the_same_bits(worlds: Worlds, ranks: int, scene: str) -> None:
    for value in values(worlds, ranks, scene):
        assert value == {"engine": "torch", "notes": [], "tensors": 30}


@pytest.mark.parametrize("wrap", stock_scenes.HOOKED)
def test_hooks_choose_the_stock_path_and_the_report_says_so(worlds: Worlds, wrap: str) -> None:
    for engine, chosen in (("auto", "torch"), ("torch", "torch"), ("direct", "direct")):
        for value in values(worlds, 2, f"hooked/{wrap}/{engine}"):
            assert value["engine"] == chosen
            (note,) = value["notes"]
            ran = "are run" if chosen == "torch" else "are not run"
            assert note == f"{NAMED}; state dict hooks {ran}: engine='{chosen}'"


def test_a_tied_tensor_is_set_once(worlds: Worlds) -> None:
    tied = [["tok_embeddings.weight", "output.tied_module.weight"]]
    assert values(worlds, 2, "tied") == [{"engine": "torch", "tied": tied}] * 2


def test_hooks_of_one_rank_choose_for_all(worlds: Worlds) -> None:
    found = values(worlds, 2, "hooked-on-one-rank")
    assert found == [{"engine": "torch", "loaded": 10}, {"engine": "torch", "loaded": 20}]


@pytest.mark.parametrize("engine", ["direct", "torch"])
def test_every_rank_loads_its_own_experts(worlds: Worlds, engine: str) -> None:
    assert values(worlds, 2, f"experts/{engine}") == [
        ["experts.0.w.weight", "experts.2.w.weight", "router.weight"],
        ["experts.1.w.weight", "experts.3.w.weight", "router.weight"],
    ]


def test_what_nobody_has_is_unexpected_on_all(worlds: Worlds) -> None:
    outcome = failures(worlds, "nobody-has")
    assert outcome.error == "CoverageError"
    assert "1 unexpected" in outcome.text
    assert "experts.1.w.weight" in outcome.text


def test_what_one_rank_misses_fails_on_all(worlds: Worlds) -> None:
    outcome = failures(worlds, "misses-one")
    assert outcome.error == "CoverageError"
    assert "1 missing" in outcome.text
    assert "experts.9.w.weight" in outcome.text


@pytest.mark.parametrize("engine", ["direct", "torch"])
def test_a_parameter_that_was_added_after_wrapping_is_missing(worlds: Worlds, engine: str) -> None:
    assert values(worlds, 2, f"added/{engine}") == [["extra"], ["extra"]]


@pytest.mark.parametrize("engine", ["direct", "torch"])
def test_ranks_of_other_groups_do_not_meet(worlds: Worlds, engine: str) -> None:
    values(worlds, 2, f"group/{engine}")


@pytest.mark.parametrize("way", ["all", "once", "rank0", "torch"])
def test_two_groups_load_beside_each_other(worlds: Worlds, way: str) -> None:
    values(worlds, 4, f"pairs/{way}")


def test_a_group_without_this_rank_is_refused(worlds: Worlds) -> None:
    first, second = (world["foreign-group"] for world in worlds[2])
    assert not first.error
    assert (second.error, "not in" in second.text) == ("ValueError", True)


@pytest.mark.parametrize("engine", ["direct", "torch"])
def test_other_values_on_one_rank_name_the_file(worlds: Worlds, engine: str) -> None:
    outcome = failures(worlds, f"other-values/{engine}")
    assert outcome.error == "FormatError"
    assert "ranks see different checkpoints; nothing was loaded" in outcome.text
    assert "rank 1" in outcome.text
    assert ".safetensors: " in outcome.text
    assert "with other contents" in outcome.text
