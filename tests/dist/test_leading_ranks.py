"""Job arrays whose rank 0, or whoever leads after it, is killed at any step of publishing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from dcpconv import convert, fingerprint
from dcpconv.engine.manifests import MANIFEST
from dcpconv.engine.worlds.meeting import read_beat
from support.checkpoints.check_cases import llama_shapes, write_hf
from support.worlds.conversions import (
    ends,
    random_hf,
    rank_of,
    ranks,
    script,
    staged,
    tree,
    until,
)

LEAVES = """
import os, signal, time
from dcpconv.engine.worlds.watching import Watch
def leave(watch):
    while len(list(watch.meeting.path.glob("seat-*"))) < {come}:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.{signal})
    signal.pause()
Watch.wait = leave
"""
"""A rank that is ended as soon as its share is done, and others have come."""

DIES = """
import os, signal
from dcpconv.engine.worlds import watching
from dcpconv.engine.worlds.meeting import Meeting
from dcpconv.engine import publish
led = []
claim = Meeting.claim_lead
def claim_lead(meeting, rank):
    is_mine = claim(meeting, rank)
    if is_mine:
        led.append(rank)
    return is_mine
Meeting.claim_lead = claim_lead
def dies(before, what=None):
    def step(*args, **options):
        if led == [{after}] and before:
            os.kill(os.getpid(), signal.SIGKILL)
        found = what(*args, **options)
        if led == [{after}] and not before:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return step
"""
"""A rank that is killed at a step, if it leads after rank ``after``."""

STEPS = {
    "inherited": "publish.Staging.publish = dies(True, publish.Staging.publish)",
    "synced": "publish._sync_files = dies(False, publish._sync_files)",
    "committed": "publish._sync_directories = dies(False, publish._sync_directories)",
    "renamed": "publish.Staging._rename = dies(False, publish.Staging._rename)",
    "told": "watching.wait_for_farewell = dies(True, watching.wait_for_farewell)",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """What one process makes of it."""
    convert(source, source.parent / "whole", form="dcp")
    return tree(source.parent / "whole")


def spoken(found: list[tuple[int, str, str]]) -> dict[str, Any]:
    """The one report."""
    (text,) = [out for _, out, _ in found if out]
    made: dict[str, Any] = json.loads(text)
    return made


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_rank_0_ends_after_its_share(
    number: str, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    leaves = script(before=LEAVES.format(signal=number, come=3))
    started = ranks(source, tmp_path / "out", [leaves, script(), script()])
    found = ends(started)
    assert [code for code, _, _ in found[1:]] == [0, 0], found
    assert found[0][0] == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 130}[number]
    report = spoken(found)
    assert report["published_by"] in {1, 2}
    assert [share["rank"] for share in report["shares"]] == [0, 1, 2]
    assert tree(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", STEPS)
def test_whoever_publishes_is_killed(
    step: str, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Another one goes on, and finds out what has been done."""
    leaves = script(before=LEAVES.format(signal="SIGKILL", come=3))
    dies = script(before=DIES.format(after=0) + STEPS[step])
    found = ends(ranks(source, tmp_path / "out", [leaves, dies, dies], "--fingerprint"))
    codes = [code for code, _, _ in found]
    assert codes[0] == -signal.SIGKILL
    assert sorted(codes[1:]) == [-signal.SIGKILL, 0], found
    made = tree(tmp_path / "out")
    stated = json.loads(made.pop(MANIFEST))["fingerprint"]
    assert stated == fingerprint(source).digest
    said = [json.loads(out)["fingerprint"] for _, out, _ in found if out]
    assert said == ([] if step == "told" else [stated])
    assert made == whole


@pytest.mark.parametrize("step", STEPS)
def test_the_last_one_is_killed_too(
    step: str, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The target is absent or whole, and the next run has nothing to write again."""
    target = tmp_path / "out"
    leaves = script(before=LEAVES.format(signal="SIGKILL", come=2))
    dies = script(before=DIES.format(after=0) + STEPS[step])
    found = ends(ranks(source, target, [leaves, dies]))
    assert [code for code, _, _ in found] == [-signal.SIGKILL] * 2
    assert target.exists() == (step in {"renamed", "told"})
    if target.exists():
        assert tree(target) == whole
        assert staged(target).exists()
        refused = ends([rank_of(source, target, script(), 0, 2)])
        assert refused[0][0] == 2
        assert "the target exists" in refused[0][2]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        return
    again = ends(ranks(source, target, [script()] * 3))
    assert [code for code, _, _ in again] == [0, 0, 0], again
    report = spoken(again)
    assert report["resumed"] == report["target"]["nbytes"]
    assert tree(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", ["dcp", "torch"])
def test_a_publisher_that_has_told_the_verdict_is_killed(
    form: str, source: Path, tmp_path: Path
) -> None:
    """The others have heard, and the next run has nothing to go on with."""
    target = tmp_path / "out"
    convert(source, tmp_path / "one", form=form)  # type: ignore[arg-type]  # one of two
    expected = tree(tmp_path / "one")
    dies = script(before=DIES.format(after=0).replace("led == [0]", "True") + STEPS["told"])
    found = ends(ranks(source, target, [dies, script()], "--form", form))
    assert [code for code, _, _ in found] == [-signal.SIGKILL, 0], found
    assert tree(target) == expected
    assert staged(target).exists()

    again = ends(ranks(source, target, [script()] * 2, "--form", form, "--overwrite"))
    assert [code for code, _, _ in again] == [0, 0], again
    report = spoken(again)
    assert report["resumed"] == 0
    assert sum(report["moved"].values()) == report["target"]["nbytes"]
    assert tree(target) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]


def test_an_old_target_is_exchanged_or_stays(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    convert(write_hf(tmp_path / "old", llama_shapes(), files=2), target, form="dcp")
    leaves = script(before=LEAVES.format(signal="SIGKILL", come=3))
    dies = script(before=DIES.format(after=0) + STEPS["renamed"])
    found = ends(ranks(source, target, [leaves, dies, dies], "--overwrite"))
    assert sorted(code for code, _, _ in found) == [-signal.SIGKILL] * 2 + [2]
    assert any("has ended without a word" in err for _, _, err in found)
    assert tree(target) == whole
    again = ends(ranks(source, target, [script()] * 2, "--overwrite"))
    assert spoken(again)["resumed"] == 0
    assert tree(target) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "out"]


def test_a_rank_comes_when_another_leads(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    leaves = script(before=LEAVES.format(signal="SIGKILL", come=2))
    started = [
        rank_of(source, target, program, rank, 3) for rank, program in enumerate([leaves, script()])
    ]
    until(lambda: leads(target, 1))
    found = ends([*started, rank_of(source, target, script(), 2, 3)])
    assert [code for code, _, _ in found] == [-signal.SIGKILL, 0, 0], found
    assert spoken(found)["published_by"] == 1
    assert tree(target) == whole


def leads(target: Path, rank: int) -> bool:
    beat = read_beat(staged(target) / "shares", rank)
    return beat is not None and beat.leads


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_start_ends_the_others(rank: int, source: Path, tmp_path: Path) -> None:
    """A package is missing on its host, or the source is."""
    broken = "sys.modules['dcpconv.conversion.deciding'] = None\n"
    programs = [script(before=broken if at == rank else "") for at in range(3)]
    found = ends(ranks(source, tmp_path / "out", programs))
    assert all(code for code, _, _ in found)
    for at, (_, _, err) in enumerate(found):
        assert "dcpconv.conversion.deciding" in err
        assert at == rank or f"rank {rank} failed: " in err
    assert not (tmp_path / "out").exists()


def test_a_rank_without_the_source_ends_the_others(source: Path, tmp_path: Path) -> None:
    started = [
        rank_of(source if rank else tmp_path / "nothing", tmp_path / "out", script(), rank, 3)
        for rank in range(3)
    ]
    found = ends(started)
    for code, _, err in found:
        assert code == 2
        assert "nothing" in err
        assert "rank      0 on" in err
