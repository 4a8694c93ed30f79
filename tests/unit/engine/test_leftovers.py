"""What stays of a staging directory beside a target that is there already."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dcpconv import convert
from dcpconv.core.errors import TargetExistsError
from dcpconv.engine.publish import OWNER, RESULT, SHARES, staging_directory
from dcpconv.engine.worlds import meeting
from dcpconv.engine.worlds.meeting import Meeting, set_up
from dcpconv.engine.worlds.seats import Seat
from support.checkpoints.check_cases import llama_shapes, write_hf


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source", llama_shapes())


@pytest.fixture
def root(source: Path, tmp_path: Path) -> Path:
    """The staging directory of a conversion whose target is there, and which was killed."""
    convert(source, tmp_path / "out", form="dcp")
    made = staging_directory(tmp_path / "out")
    (made / RESULT).mkdir(parents=True)
    (made / OWNER).touch()
    set_up(made / SHARES, 2)
    return made


def is_cleared(source: Path, root: Path) -> bool:
    with pytest.raises(TargetExistsError):
        convert(source, root.parent / "out", form="dcp")
    assert (root.parent / "out/.metadata").exists()
    return not root.exists()


def test_what_nobody_goes_on_with_is_removed(source: Path, root: Path) -> None:
    (root / SHARES / "plan").touch()
    assert is_cleared(source, root)


def test_an_old_target_that_was_exchanged_is_removed(source: Path, root: Path) -> None:
    """The plan goes before the exchange."""
    (root / RESULT / "old").touch()
    assert is_cleared(source, root)


def test_what_a_run_goes_on_with_stays(source: Path, root: Path) -> None:
    (root / SHARES / "plan").touch()
    (root / RESULT / "file").touch()
    assert not is_cleared(source, root)
    assert (root / RESULT / "file").exists()


def test_a_directory_that_is_locked_stays(source: Path, root: Path) -> None:
    import fcntl

    with (root / OWNER).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not is_cleared(source, root)
    assert is_cleared(source, root)


@pytest.mark.parametrize("state", ["working", "done", "published"])
def test_a_rank_that_is_alive_keeps_it(state: meeting.State, source: Path, root: Path) -> None:
    Meeting(root / SHARES, Seat(1, 2), "token").beat(state)
    assert not is_cleared(source, root)
    Meeting(root / SHARES, Seat(1, 2), "token").beat("left")
    assert is_cleared(source, root)


def test_a_rank_of_another_host_keeps_it_as_long_as_it_may_be_silent(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(meeting, "process_space", lambda: "another host")
        Meeting(root / SHARES, Seat(1, 2), "token").beat()
    assert not is_cleared(source, root)
    sign = root / SHARES / "rank-1"
    before = sign.stat().st_mtime - 1000
    os.utime(sign, (before, before))
    assert is_cleared(source, root)
