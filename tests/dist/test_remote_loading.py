"""Several ranks load from a bucket or a static server: who asks for which bytes, and how often."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from dcpconv.formats.opening import open_checkpoint
from dcpconv.stores.ranged import PAGE
from support.machine.fault_proxy import Asked, Proxy, spoiling
from support.machine.s3_server import serving_s3
from support.machine.static_server import static
from support.worlds import remote_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.remote_scenes import LAYERS, NBYTES, PLACES, SCENES, SERVERS, SHARED, prepare

RANKS = [2, 3]


@dataclass
class World:
    """What the ranks made of the scenes, and what they asked for."""

    directory: Path
    ranks: list[dict[str, Outcome]]
    s3: list[Proxy]
    http: Proxy

    def values(self, scene: str) -> list[Any]:
        found = [rank[scene] for rank in self.ranks]
        for outcome in found:
            assert not outcome.error, outcome.text
        return [outcome.value for outcome in found]

    def asked(self, place: str) -> list[list[Asked]]:
        """Requests for one place, by rank for a bucket."""
        store, _, name = place.partition("/")
        proxies, path = ([self.http], name) if store == "http" else (self.s3, place)
        return [[one for one in proxy.asked if path in unquote(one.path)] for proxy in proxies]


@pytest.fixture(scope="module", params=RANKS)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    ranks = request.param
    directory = tmp_path_factory.mktemp(f"remote-{ranks}")
    prepare(directory)
    www = directory / "www"
    www.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch, ExitStack() as stack:
        bucket = stack.enter_context(serving_s3(monkeypatch))
        for scene in SCENES[ranks]:
            store, _, name = scene.partition("/")
            if store == "http":
                (www / name).parent.mkdir(parents=True, exist_ok=True)
                (www / name).symlink_to(directory / "hf")
            else:
                bucket.upload(directory / ("dcp" if "dcp" in scene else "hf"), scene)
        http = stack.enter_context(spoiling(stack.enter_context(static(www))))

        def choose(rank: int) -> Any:
            def fault(_method: str, path: str) -> str:
                is_data = ".safetensors" in path and "broken/" in path and rank == 1
                return "503" if is_data or ("closed" in path and rank == 0) else ""

            return fault

        s3 = [stack.enter_context(spoiling(bucket.url, choose(n))) for n in range(ranks)]
        servers = {"s3": [proxy.url for proxy in s3], "http": http.url}
        (directory / SERVERS).write_text(json.dumps(servers))
        found = launch(remote_scenes.__file__, ranks, directory)
        yield World(directory, found, s3, http)


def times_read(asked: list[Asked], file: str, begin: int, end: int) -> set[int]:
    """How often the bytes of an interval were asked for."""
    edges: dict[int, int] = {begin: 0, end: 0}
    for one in asked:
        if one.method == "GET" and one.path.partition("?")[0].endswith(f"/{file}"):
            first, _, last = one.range.removeprefix("bytes=").partition("-")
            start, stop = max(int(first), begin), min(int(last) + 1, end)
            if start < stop:
                edges[start] = edges.get(start, 0) + 1
                edges[stop] = edges.get(stop, 0) - 1
    times, found = 0, set[int]()
    for at in sorted(edges):
        times += edges[at]
        if at < end:
            found.add(times)
    return found


@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("store", PLACES)
def test_every_byte_is_asked_for_once_per_job_or_host(world: World, store: str, way: str) -> None:
    place = f"{store}/{way}"
    found = world.values(place)  # the bits are those of the disk, or the scene has failed
    _, _, hosts, how = SHARED[way]
    assert {one["how"] for one in found} == {how}
    assert sum(one["read"] for one in found) == hosts * NBYTES
    asked = [one for rank in world.asked(place) for one in rank]
    catalog = open_checkpoint(world.directory / store.split("/")[1])
    for entry in catalog.tensors.values():
        (chunk,) = entry.chunks
        # What stands at the ends of a tensor may have come with a page of its header.
        begin = chunk.extent.offset + PAGE
        end = chunk.extent.offset + chunk.extent.nbytes - PAGE
        assert times_read(asked, chunk.extent.file, begin, end) == {hosts}, entry.key


def test_ranks_on_more_hosts_than_it_is_worth_reading_from_send(world: World) -> None:
    if len(world.ranks) < 3:
        pytest.skip("takes three hosts")
    found = world.values("s3/hf/ddp-apart")
    assert {one["how"] for one in found} == {"once"}
    assert sum(one["read"] for one in found) == NBYTES
    assert "one read per host would be 3.00 x" in found[0]["notes"][0]


@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("store", ["s3/hf", "s3/dcp"])
def test_one_rank_lists_and_opens(world: World, store: str, way: str) -> None:
    first, *others = world.asked(f"{store}/{way}")
    assert any(not one.range for one in first)
    for asked in others:
        assert asked
        assert all(one.method == "GET" and one.range for one in asked)
        spans = [one.range.removeprefix("bytes=").split("-") for one in asked]
        small = [span for span in spans if int(span[1]) - int(span[0]) < PAGE]
        # What stands before an item of a DCP is checked by whoever reads the item.
        assert len(small) <= (LAYERS if store == "s3/dcp" else 0)
        assert all(".distcp" in one.path or ".safetensors" in one.path for one in asked)


@pytest.mark.parametrize("read", ["all", "once"])
def test_a_server_that_fails_one_rank_is_one_error(world: World, read: str) -> None:
    found = [rank[f"broken/{read}"] for rank in world.ranks]
    assert {outcome.error for outcome in found} == {"StoreError"}
    assert len({outcome.text for outcome in found}) == 1
    assert "status 503" in found[0].text
    assert f"on ranks  1 of {len(world.ranks)}" in found[0].text
    assert "its weights are undefined now" in found[0].text


def test_a_server_that_fails_the_first_rank_is_one_error(world: World) -> None:
    found = [rank["closed"] for rank in world.ranks]
    assert {outcome.error for outcome in found} == {"StoreError"}
    assert len({outcome.text for outcome in found}) == 1
    _, *others = world.asked("closed")
    assert others == [[]] * (len(world.ranks) - 1)


def test_all_ranks_read_the_versions_that_the_first_has_listed(world: World) -> None:
    found = [rank["changes"] for rank in world.ranks]
    assert {outcome.error for outcome in found} == {"SourceChangedError"}
    assert len({outcome.text for outcome in found}) == 1
