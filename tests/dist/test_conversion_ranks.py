"""Conversions by several processes: torchrun, job arrays, and everything that can happen to one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dcpconv import convert
from support.checkpoints.check_cases import llama_shapes, write_hf
from support.worlds.conversions import (
    SMALL,
    ends,
    environment,
    random_hf,
    ranks,
    script,
    staged,
    start,
    tree,
    until,
)

SLOW = """
import time
from dcpconv.engine.worlds.meeting import Meeting
note = Meeting.note_done
def slowly(meeting, record):
    note(meeting, record)
    time.sleep({seconds})
Meeting.note_done = slowly
"""
"""A rank that takes its time after every piece that it has noted as done."""

ELSEWHERE = """
from dcpconv.engine.worlds import meeting
meeting.process_space = lambda: "another host"
"""
"""A rank whose process nobody else can look up."""

OTHER_CLOCK = "import time\ntime.time = lambda: 0.0\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """What one process makes of it."""
    convert(source, source.parent / "whole", form="dcp")
    return tree(source.parent / "whole")


def report(found: list[tuple[int, str, str]]) -> dict[str, Any]:
    """The one report of all ranks."""
    assert [code for code, _, _ in found] == [0] * len(found), found
    assert [out for _, out, _ in found[1:]] == [""] * (len(found) - 1)
    made: dict[str, Any] = json.loads(found[0][1])
    return made


def has_noted(target: Path, count: int) -> bool:
    """Whether each of so many ranks has noted that something is done."""
    shares = staged(target) / "shares"
    return all(next(shares.glob(f"done-{rank}-*"), None) for rank in range(count))


@pytest.mark.parametrize("count", [2, 4])
def test_torchrun(count: int, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = tmp_path / "dcpconv_small.py"
    program.write_text(script())
    done = subprocess.run(
        [
            *(*run, "--nproc-per-node", str(count), str(program)),
            *("convert", str(source), str(tmp_path / "out"), "--form", "dcp", "--json"),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [share["rank"] for share in found["shares"]] == list(range(count))
    assert all(share["nbytes"] for share in found["shares"])
    assert tree(tmp_path / "out") == whole


def test_torchrun_ends_with_the_error_of_a_rank(source: Path, tmp_path: Path) -> None:
    program = tmp_path / "dcpconv_small.py"
    fails = (
        "import os\nif os.environ['RANK'] == '1':\n    def note(*_): raise OSError(28, 'full')\n"
    )
    fails += "    from dcpconv.engine.worlds.meeting import Meeting\n    Meeting.note_done = note\n"
    program.write_text(script(before=fails))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(program)),
            *("convert", str(source), str(tmp_path / "out"), "--form", "dcp"),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode
    assert "full" in done.stderr
    assert not (tmp_path / "out").exists()


def test_jobs_that_share_only_a_directory(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Another host, another clock, another path of the same files: all that may differ."""
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "mounted").symlink_to(tmp_path / "shared")
    last = start(
        script(before=ELSEWHERE + OTHER_CLOCK),
        *("convert", mine, tmp_path / "mounted/out", "--form", "dcp", "--rank", "1", "--of", "2"),
    )
    first = start(
        script(),
        *("convert", source, tmp_path / "shared/out", "--form", "dcp", "--json"),
        *("--rank", "0", "--of", "2"),
    )
    found = report(ends([first, last]))
    assert all(share["nbytes"] for share in found["shares"])
    assert tree(tmp_path / "shared/out") == whole
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["out"]


def test_a_slow_rank_is_waited_for(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Longer than a silent one would be: it says that it is alive."""
    patches = {**SMALL, "dcpconv.engine.worlds.watching.LOST_AFTER": 1.0}
    slow = script(patches, before=ELSEWHERE + SLOW.format(seconds=0.3))
    found = report(ends(ranks(source, tmp_path / "out", [script(patches), slow])))
    slowest = max(found["shares"], key=lambda share: share["seconds"])
    assert slowest["rank"] == 1
    assert slowest["seconds"] > 1.0
    assert tree(tmp_path / "out") == whole


def test_a_silent_rank_of_another_host_is_lost(source: Path, tmp_path: Path) -> None:
    patches = {**SMALL, "dcpconv.engine.worlds.watching.LOST_AFTER": 2.0}
    silent = script(patches, before=ELSEWHERE + SLOW.format(seconds=0.2))
    started = ranks(source, tmp_path / "out", [script(patches), silent])
    until(lambda: has_noted(tmp_path / "out", 2))
    started[1].send_signal(signal.SIGSTOP)
    ((code, _, err),) = ends(started[:1])
    started[1].kill()
    started[1].communicate()
    assert code == 2
    assert "rank 1 does not answer" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_rank_is_named_and_the_next_run_goes_on(
    killed: int, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    started = ranks(source, target, [script(before=SLOW.format(seconds=0.2))] * 3)
    until(lambda: has_noted(target, 3))
    started[killed].kill()
    started[killed].communicate()
    for code, _, err in ends(one for one in started if one is not started[killed]):
        assert code == 2
        assert f"rank {killed} has ended without a word" in err
        assert f"rank      {killed} on" in err
    assert not target.exists()

    found = report(ends(ranks(source, target, [script()] * 2)))
    assert 0 < found["resumed"] < found["target"]["nbytes"]
    written = sum(share["nbytes"] for share in found["shares"])
    assert written + found["resumed"] == found["target"]["nbytes"]
    assert sum(found["moved"].values()) >= found["target"]["nbytes"]
    assert tree(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_plan_starts_clean(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    started = ranks(source, target, [script(before=SLOW.format(seconds=0.2))] * 2)
    until(lambda: has_noted(target, 2))
    for process in started:
        process.kill()
        process.communicate()
    found = report(ends(ranks(source, target, [script()] * 2, "--chunks", "3")))
    assert found["resumed"] == 0
    convert(source, tmp_path / "one", form="dcp", chunks=3)
    assert tree(target) == tree(tmp_path / "one")


def test_one_process_after_several_starts_clean(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    started = ranks(source, target, [script(before=SLOW.format(seconds=0.2))] * 2)
    until(lambda: has_noted(target, 2))
    for process in started:
        process.kill()
        process.communicate()
    convert(source, target, form="dcp")
    assert tree(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("seed", range(6))
def test_any_rank_killed_at_any_moment(
    seed: int, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    target = tmp_path / "out"
    started = ranks(source, target, [script(before=SLOW.format(seconds=0.03))] * 3)
    until(lambda: staged(target).exists())
    time.sleep(rng.uniform(0, 1.5))
    started[seed % 3].kill()
    ends(started)
    if target.exists():
        assert tree(target) == whole
        shutil.rmtree(target)
    report(ends(ranks(source, target, [script()] * 3)))
    assert tree(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_target_stays_whole(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The kill lets the old target lie where the new one was made: it is not gone on with."""
    target = tmp_path / "out"
    old = write_hf(tmp_path / "old", llama_shapes(), files=2)
    convert(old, target, form="dcp")
    before = tree(target)
    dies = (
        "import os, signal\nfrom dcpconv.engine import exchanging\nexchange = exchanging.exchange\n"
    )
    dies += "def die(*paths):\n    exchange(*paths)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    dies += "exchanging.exchange = die\n"
    ends(ranks(source, target, [script(before=dies), script()], "--overwrite"))
    assert tree(target) == whole != before
    assert tree(staged(target) / "result") == before

    found = report(ends(ranks(source, target, [script()] * 2, "--overwrite")))
    assert found["resumed"] == 0
    assert tree(target) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "out"]


@pytest.mark.parametrize(
    ("number", "stays"), [(signal.SIGINT, False), (signal.SIGTERM, True)], ids=["ctrl-c", "told"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_ends_all(
    number: int, rank: int, source: Path, whole: dict[str, bytes], tmp_path: Path, *, stays: bool
) -> None:
    target = tmp_path / "out"
    started = ranks(source, target, [script(before=SLOW.format(seconds=0.2))] * 2)
    until(lambda: has_noted(target, 2))
    started[rank].send_signal(number)
    found = ends(started)
    assert found[rank][0] == 130
    assert f"rank {rank} was " in found[1 - rank][2]
    assert not target.exists()
    assert staged(target).exists() == stays
    made = report(ends(ranks(source, target, [script()] * 2)))
    assert (made["resumed"] > 0) == stays
    assert tree(target) == whole


def test_a_rank_that_cannot_write_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    target = tmp_path / "shared/out"
    mount = f"mount --bind {target.parent} {target.parent} && mount -o remount,bind,ro"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-m", "sh", "-c", f"{mount} {target.parent}"],
            check=False,
            capture_output=True,
        ).returncode
    ):
        pytest.skip("no read-only mount of one's own can be made")
    patches = {**SMALL, "dcpconv.engine.worlds.watching.PATIENCE": 6.0}
    first = start(
        script(patches), *("convert", source, target, "--form", "dcp", "--rank", "0", "--of", "2")
    )
    program = tmp_path / "rank.py"
    program.write_text(script(patches))
    command = f"{mount} {target.parent} && exec {sys.executable} -W ignore {program}"
    command += f" convert {source} {target} --form dcp --rank 1 --of 2"
    second = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 2
    assert "not writable by you" in second.stderr or "Read-only" in second.stderr
    assert "rank      1 on" in second.stderr
    ((code, _, err),) = ends([first])
    assert code == 2
    assert "rank 1 has not come" in err
    assert not target.exists()
