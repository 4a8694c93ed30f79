"""The simulation of ``bench.ranks``, on a small job: what planning opens and says."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench.ranks import Scale, simulate, table
from bench.ranks_picture import picture

TENSORS, RANKS, REPLICAS = 400, 64, 4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    scale = Scale(
        ranks=RANKS,
        per_host=8,
        replicas=REPLICAS,
        tensors=TENSORS,
        storage=1.0,
        network=1.0,
        latency=0.001,
    )
    return simulate(scale, [RANKS - 1], tmp_path_factory.mktemp("ranks"))


def test_headers_are_opened_once_per_job(found: dict[str, Any]) -> None:
    first, last = found["ranks"]
    assert first["opens"] == found["checkpoint"]["files"]
    assert last["opens"] == 0
    assert found["met"]["opens"]


def test_what_ranks_say_does_not_list_tensors(found: dict[str, Any]) -> None:
    first, last = found["ranks"]
    assert last["said"] < 40 * TENSORS  # lots, one mark per tensor, and flags
    assert first["catalog"] < 60 * TENSORS
    assert sum(last["messages"].values()) == sum(first["messages"].values()) < 20


def test_every_byte_is_read_once(found: dict[str, Any]) -> None:
    first, last = found["ranks"]
    for one in (first, last):
        assert one["own"] == 0  # every shard is on all replicas
        assert one["members"] == REPLICAS
        assert one["shared"] > 0
    # A shard is read in parts by its replicas: rank 0 has the first tiles.
    assert 0 < first["reads"] <= first["shared"]
    assert found["checkpoint"]["tensors"] == TENSORS


def test_numbers_are_shown(found: dict[str, Any]) -> None:
    assert "critical path  open" in table(found)
    drawn = ET.fromstring(picture(found))
    assert "64 ranks, 400 tensors" in "".join(drawn.itertext())
