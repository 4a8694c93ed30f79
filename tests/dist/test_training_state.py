"""load_training_state: a run goes on with the same losses, sharded in any way, or fails as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.worlds import training_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.training_scenes import SCENES, TRAINS, prepare

WHOLE = 3 * 923_520 + 30 * 4
"""Bytes of weights and two moments in fp32, and a count of steps for each parameter."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    prepare(directory)
    return directory


@pytest.fixture(scope="module")
def worlds(sources: Path) -> dict[int, list[dict[str, Outcome]]]:
    return {ranks: launch(training_scenes.__file__, ranks, sources) for ranks in SCENES}


def values(worlds: dict[int, list[dict[str, Outcome]]], ranks: int, scene: str) -> list[Any]:
    found = [world[scene] for world in worlds[ranks]]
    for outcome in found:
        assert not outcome.error, outcome.text
    return [outcome.value for outcome in found]


def failure(worlds: dict[int, list[dict[str, Outcome]]], scene: str) -> Outcome:
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
        if scene.startswith("resumes/")
    ],
)
def test_a_resumed_run_has_the_same_losses(
    worlds: dict[int, list[dict[str, Outcome]]], sources: Path, ranks: int, scene: str
) -> None:
    right = json.loads((sources / "losses.json").read_text())
    found = values(worlds, ranks, scene)
    for one in found:
        assert one["kinds"] == ["exp_avg", "exp_avg_sq", "step"]
        assert one["beside"] == {"step": 3, "epoch": 1}
        if scene.split("/")[1] in TRAINS:
            assert one["losses"] == pytest.approx(right, rel=2e-5)
        if scene.endswith("/all"):
            assert one["read"] == one["bytes"]
    if scene.endswith("/once"):
        assert sum(one["read"] for one in found) == WHOLE


def test_ranks_read_their_own_shards_of_the_moments(
    worlds: dict[int, list[dict[str, Outcome]]],
) -> None:
    first, second = values(worlds, 2, "resumes/fsdp2/all")
    assert first["read"] + second["read"] == WHOLE + 30 * 4  # steps are on both
    assert abs(first["read"] - second["read"]) < WHOLE / 50


def test_a_sharded_run_goes_on_bit_by_bit(worlds: dict[int, list[dict[str, Outcome]]]) -> None:
    first, second = values(worlds, 2, "bit-by-bit")
    assert first == second


def test_an_optimizer_of_tensors_without_memory_gets_those_with(
    worlds: dict[int, list[dict[str, Outcome]]], sources: Path
) -> None:
    right = json.loads((sources / "losses.json").read_text())
    for losses in values(worlds, 2, "plain-on-meta"):
        assert losses == pytest.approx(right, rel=2e-5)


FAILURES = {
    "fails/lacking": ("CoverageError", ("1 optimizer", "layers.1.attention.wq.weight  has no")),
    "fails/strange": ("CoverageError", ("1 optimizer", "lacks exp_avg", "has momentum_buffer")),
    "fails/missing-weight": ("CoverageError", ("1 missing", "missing   norm.weight")),
    "fails/no-optimizer": ("NotACheckpointError", ("no optimizer state",)),
    "another-class": ("CoverageError", ("which SGD does not keep",)),
}


@pytest.mark.parametrize("scene", FAILURES)
def test_one_verdict_before_anything_changes(
    worlds: dict[int, list[dict[str, Outcome]]], scene: str
) -> None:
    error, texts = FAILURES[scene]
    found = failure(worlds, scene)
    assert found.error == error, found.text
    for text in texts:
        assert text in found.text


def test_every_stage_of_a_pipeline_gets_its_own(
    worlds: dict[int, list[dict[str, Outcome]]],
) -> None:
    assert values(worlds, 2, "two-stages") == [10, 20]


def test_two_groups_go_on_with_two_runs(worlds: dict[int, list[dict[str, Outcome]]]) -> None:
    reads = values(worlds, 4, "two-groups")
    assert [sum(reads[:2]), sum(reads[2:])] == [WHOLE, WHOLE]
