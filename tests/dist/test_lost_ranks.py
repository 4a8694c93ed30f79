"""A rank that dies or hangs while loading: the other ends with an error that names both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.worlds import lost_ranks
from support.worlds.lost_ranks import PAIRS, SOURCES
from support.worlds.ranks import run_ranks


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lost")
    lost_ranks.prepare(directory)
    run_ranks(lost_ranks.__file__, 2 * len(PAIRS), directory, timeout_s=150)
    return directory


@pytest.mark.parametrize("pair", PAIRS)
def test_the_other_rank_ends_with_our_error(heard: Path, pair: str) -> None:
    found = json.loads((heard / f"{pair}.json").read_text())
    assert found["error"] == "LostRankError", found
    assert "a rank was lost while loading" in found["text"]
    assert f"load      {heard / SOURCES[pair]}" in found["text"]
    # In the middle of torch's own collectives all ranks have come: which one went cannot be told.
    lost = "cannot be told" if pair == "stock" else "rank 1 of 2"
    assert f"lost      {lost}" in found["text"]
    assert "here      rank 0 on" in found["text"]
