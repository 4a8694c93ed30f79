"""Ranks on several hosts: one catalog, and every byte once where that is asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.worlds import host_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.host_scenes import RANKS, SCENES, prepare

WHOLE = 923_520
"""Bytes of the model's weights in fp32."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    prepare(directory)
    return directory


@pytest.fixture(scope="module")
def world(sources: Path) -> list[dict[str, Outcome]]:
    return launch(host_scenes.__file__, RANKS, sources)


def values(world: list[dict[str, Outcome]], scene: str) -> list[Any]:
    found = [rank[scene] for rank in world]
    for outcome in found:
        assert not outcome.error, outcome.text
    return [outcome.value for outcome in found]


@pytest.mark.parametrize("scene", [name for name in SCENES[RANKS] if name.startswith("tiles/")])
def test_tiles_reach_everybody(world: list[dict[str, Outcome]], scene: str) -> None:
    _, wrap, read = scene.split("/")
    found = values(world, scene)
    reads = [one["read"] for one in found]
    assert {one["how"] for one in found} == {read}
    if read == "rank0":
        assert reads == [WHOLE, 0, 0, 0]
        return
    # tp shards over all ranks of the two hosts; its norms are read once, or once per host.
    assert sum(reads) == WHOLE if read == "once" else WHOLE <= sum(reads) <= 2 * WHOLE
    assert all(one["read"] + one["received"] >= one["bytes"] for one in found)
    if wrap in {"ddp", "hsdp"} and read == "once":
        assert max(reads) - min(reads) <= 3 * host_scenes.SMALL  # by bytes: nobody reads much more


@pytest.mark.parametrize("scene", ["casts/hsdp", "casts/fsdp2-tp"])
def test_tiles_are_cast_where_they_land(world: list[dict[str, Outcome]], scene: str) -> None:
    values(world, scene)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_what_nobody_shares_is_read_directly(world: list[dict[str, Outcome]], hosts: int) -> None:
    for one in values(world, f"auto/fsdp2/{hosts}"):
        assert (one["how"], one["read"], one["received"]) == ("all", one["bytes"], 0)
    for one in values(world, "once/fsdp2"):
        assert (one["how"], one["read"], one["received"]) == ("once", one["bytes"], 0)


@pytest.mark.parametrize(
    ("hosts", "how", "notes"),
    [
        (1, "all", []),
        (2, "all", ["read='all': every rank reads its shards; one read per host would be 2.00 x"]),
        (4, "once", ["read='once': ranks send to each other; one read per host would be 4.00 x"]),
    ],
)
def test_bytes_decide_and_the_report_says_so(
    world: list[dict[str, Outcome]], hosts: int, how: str, notes: list[str]
) -> None:
    found = values(world, f"auto/ddp/{hosts}")
    for one in found:
        assert one["how"] == how
        assert [
            note[: len(start)] for note, start in zip(one["notes"], notes, strict=True)
        ] == notes
    assert sum(one["read"] for one in found) == (WHOLE if how == "once" else RANKS * WHOLE)


def test_one_rank_opens_what_all_hosts_see(world: list[dict[str, Outcome]], sources: Path) -> None:
    first, *others = values(world, "opens/shared")
    assert others == [[], [], []]
    weights = Counter(name for name in first if name.endswith(".safetensors"))
    assert weights == Counter(file.name for file in (sources / "hf-untied").glob("*.safetensors"))


def test_one_rank_of_each_host_opens_its_copies(world: list[dict[str, Outcome]]) -> None:
    first, beside, second, last = values(world, "opens/copies")
    assert beside == last == []
    assert {*first} == {*second} != set()


@pytest.mark.parametrize("scene", ["adapter/shared", "adapter/rank0"])
def test_one_rank_opens_an_adapter_that_all_hosts_see(
    world: list[dict[str, Outcome]], scene: str
) -> None:
    first, *others = values(world, scene)
    assert others == [[], [], []]
    assert Counter(first) == {"adapter_model.safetensors": 1, "adapter_config.json": 1}


def test_one_rank_of_each_host_opens_its_copy_of_an_adapter(
    world: list[dict[str, Outcome]],
) -> None:
    first, beside, second, last = values(world, "adapter/copies")
    assert beside == last == []
    assert {*first} == {*second} == {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        ("adapter/differs", "another config or other options"),
        ("adapter/more", "1 on some ranks, 2 on others"),
    ],
)
def test_ranks_that_would_merge_something_else_are_told(
    world: list[dict[str, Outcome]], scene: str, text: str
) -> None:
    found = [rank[scene] for rank in world]
    assert all(outcome.error for outcome in found)
    assert len({outcome.text for outcome in found}) == 1
    assert text in found[0].text


def test_other_files_on_one_host_are_told(world: list[dict[str, Outcome]]) -> None:
    found = [rank["differs"] for rank in world]
    assert {outcome.error for outcome in found} == {"FormatError"}
    assert len({outcome.text for outcome in found}) == 1
    for text in ("ranks see different checkpoints", "rank 2    host-2 ", "rank 0    host-0 "):
        assert text in found[0].text
    assert "rank 1" not in found[0].text
    assert "file      model" in found[0].text


def test_a_hub_that_cannot_be_reached_fails_on_all(world: list[dict[str, Outcome]]) -> None:
    found = [rank["hub/unreachable"] for rank in world]
    assert len({(outcome.error, outcome.text) for outcome in found}) == 1
    assert "no route to org/model" in found[0].text


@pytest.mark.parametrize("read", ["all", "once"])
def test_planning_takes_a_group_of_its_own_where_the_given_one_has_no_cpu(
    world: list[dict[str, Outcome]], read: str
) -> None:
    everyone = [*range(RANKS)]
    assert values(world, f"over-cpu/{read}") == [[1, [everyone]]] * RANKS


def test_part_of_a_job_loads_by_itself(world: list[dict[str, Outcome]]) -> None:
    nothing, first, nothing_either, second = values(world, "part-of-the-job")
    assert nothing is nothing_either is None
    assert first + second == WHOLE
    assert first > 0 < second


def test_part_of_a_job_merges_an_adapter_by_itself(world: list[dict[str, Outcome]]) -> None:
    assert values(world, "adapter/part-of-the-job") == [None, 30, None, 30]
