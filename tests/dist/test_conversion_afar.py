"""Conversions into a bucket by the ranks of torchrun: whole objects each and one commit."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dcpconv import check, convert
from dcpconv.core.errors import DcpconvError
from support.machine.s3_server import BUCKET, Bucket, serving_s3
from support.worlds.conversions import agent, ends, random_hf, script, start, torchrun, tree

CHUNKS = ("--form", "dcp", "--chunks", "6")
"""A result of six objects with data."""

ENDS = """
import os
from dcpconv.stores.objects import ObjectsStore
put = ObjectsStore.put
def ending(store, key, parts, **options):
    put(store, key, parts, **options)
    if key.endswith(".distcp"):
        os.kill(os.getpid(), {number})
ObjectsStore.put = ending
"""
"""A rank that gets a signal when its first object is there."""

DENIED = """
from dcpconv.stores.objects import ObjectsStore
from dcpconv.stores.store import StoreError
put = ObjectsStore.put
seen = []
def denied(store, key, parts, **options):
    seen.append(key)
    if len(seen) > 1:
        raise StoreError("access was denied", [("object", key)])
    put(store, key, parts, **options)
ObjectsStore.put = denied
"""
"""A rank that may not write its second object."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch, serving_s3(patch) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def whole(source: Path, bucket: Bucket) -> dict[str, bytes]:
    """What one process makes of it, on a disk as in a bucket."""
    convert(source, source.parent / "whole", form="dcp", chunks=6)
    convert(source, f"s3://{BUCKET}/whole", form="dcp", chunks=6)
    made = tree(source.parent / "whole")
    assert bucket.contents("whole") == made
    return made


@contextmanager
def ranks(
    programs: Sequence[str], *arguments: str | Path, each: Sequence[Sequence[str]] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that meet as the workers of one torchrun do, of which one can end alone."""
    with agent(len(programs)) as given:
        yield [
            start(program, "convert", *arguments, *(each[rank] if each else ()), given=given[rank])
            for rank, program in enumerate(programs)
        ]


def objects(bucket: Bucket, prefix: str) -> list[str]:
    """Objects with data."""
    return [key for key in bucket.keys(f"{prefix}/") if key.endswith(".distcp")]


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_of_torchrun_make_the_bytes_of_one_process(
    count: int, source: Path, whole: dict[str, bytes], bucket: Bucket, tmp_path: Path
) -> None:
    target = f"s3://{BUCKET}/ranks-{count}"
    done = torchrun(count, tmp_path, script(), "convert", source, target, *CHUNKS, "--json")
    assert done.returncode == 0, done.stderr
    assert bucket.contents(f"ranks-{count}") == whole
    assert not bucket.unfinished()
    report: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    assert [share["rank"] for share in report["shares"]] == list(range(count))
    assert all(share["nbytes"] for share in report["shares"])
    assert sum(share["nbytes"] for share in report["shares"]) == report["target"]["nbytes"]


@pytest.mark.parametrize("form", ["hf", "out.pth"])
def test_a_result_of_one_object_is_sent_by_rank_0(
    form: str, source: Path, bucket: Bucket, tmp_path: Path
) -> None:
    here, there = tmp_path / "here" / form, f"s3://{BUCKET}/one/{form}"
    options = ("--form", "hf") if form == "hf" else ("--to", "lingua")
    wanted: dict[str, Any] = {options[0].removeprefix("--"): options[1]}
    convert(source, here, **wanted)
    with ranks([script()] * 2, source, there, *options, "--json") as started:
        found = ends(started)
    assert [code for code, _, _ in found] == [0, 0], found
    report = json.loads(found[0][1])
    assert [bool(share["nbytes"]) for share in report["shares"]] == [True, False]
    assert any("rank 0" in note for note in report["notes"])
    assert bucket.contents(f"one/{form}") == tree(here)


def test_all_hear_that_the_target_exists(
    source: Path, whole: dict[str, bytes], bucket: Bucket
) -> None:
    with ranks([script()] * 2, source, f"s3://{BUCKET}/whole", *CHUNKS) as started:
        found = ends(started)
    for code, _, err in found:
        assert code == 2
        assert "the target exists" in err
    assert bucket.contents("whole") == whole


def test_what_ranks_do_not_agree_on_is_named(source: Path, whole: object, bucket: Bucket) -> None:
    del whole
    each = [("--chunks", "6"), ("--chunks", "5")]
    target = f"s3://{BUCKET}/differ"
    with ranks([script()] * 2, source, target, "--form", "dcp", each=each) as started:
        found = ends(started)
    for code, _, err in found:
        assert code == 2
        assert "option    chunks: 6 on rank 0, 5" in err
    assert bucket.contents("differ") == {}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_source_that_one_rank_cannot_find_ends_all(
    rank: int, source: Path, bucket: Bucket, tmp_path: Path
) -> None:
    target = f"s3://{BUCKET}/unfound"
    each = [(str(tmp_path / "no" if one == rank else source), target) for one in range(2)]
    with ranks([script()] * 2, each=each) as started:
        found = ends(started)
    for code, _, err in found:
        assert code == 2
        assert f"rank      {rank} on" in err
    assert bucket.contents("unfound") == {}


@pytest.mark.parametrize("rank", [0, 2])
def test_what_one_rank_raises_all_raise_and_the_old_result_stays(
    rank: int, source: Path, whole: dict[str, bytes], bucket: Bucket
) -> None:
    prefix = f"denied-{rank}"
    convert(source, f"s3://{BUCKET}/{prefix}", form="dcp", chunks=6)
    programs = [script(before=DENIED if one == rank else "") for one in range(3)]
    target = f"s3://{BUCKET}/{prefix}"
    with ranks(programs, source, target, *CHUNKS, "--overwrite") as started:
        found = ends(started)
    for code, _, err in found:
        assert code == 2
        assert "access was denied" in err
        assert f"rank      {rank} on" in err
    assert bucket.contents(prefix) == whole
    assert not bucket.unfinished()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_rank_is_named_and_a_rerun_starts_clean(
    rank: int, source: Path, whole: dict[str, bytes], bucket: Bucket
) -> None:
    prefix = f"killed-{rank}"
    target = f"s3://{BUCKET}/{prefix}"
    dies = script(before=ENDS.format(number=int(signal.SIGKILL)))
    programs = [dies if one == rank else script() for one in range(3)]
    with ranks(programs, source, target, *CHUNKS) as started:
        found = ends(started)
    assert found.pop(rank)[0] == -signal.SIGKILL
    for code, _, err in found:
        assert code == 2
        assert f"rank {rank} has ended without a word" in err
        assert "it starts clean" in err
    assert ".metadata" not in bucket.contents(prefix)

    with ranks([script()] * 2, source, target, *CHUNKS) as started:
        again = ends(started)
    assert [code for code, _, _ in again] == [0, 0], again
    assert check(target, against=source)
    assert len(objects(bucket, prefix)) == 6
    assert len(bucket.keys(f"{prefix}/")) == len(whole)


def test_torchrun_ends_all_where_one_is_killed(
    source: Path, whole: dict[str, bytes], bucket: Bucket, tmp_path: Path
) -> None:
    dies = f"import os\nif os.environ['RANK'] == '1':\n    exec({ENDS.format(number=9)!r})\n"
    target = f"s3://{BUCKET}/ended"
    done = torchrun(2, tmp_path, script(before=dies), "convert", source, target, *CHUNKS)
    assert done.returncode
    assert ".metadata" not in bucket.contents("ended")
    done = torchrun(2, tmp_path, script(), "convert", source, target, *CHUNKS)
    assert done.returncode == 0, done.stderr
    assert check(target, against=source)
    assert len(bucket.keys("ended/")) == len(whole)


def test_ctrl_c_on_one_rank_ends_all_and_leaves_nothing(source: Path, bucket: Bucket) -> None:
    interrupted = script(before=ENDS.format(number=int(signal.SIGINT)))
    target = f"s3://{BUCKET}/interrupted"
    with ranks([script(), interrupted], source, target, *CHUNKS) as started:
        found = ends(started)
    assert [code for code, _, _ in found] == [2, 130], found
    assert "rank 1 was interrupted" in found[0][2]
    assert bucket.contents("interrupted") == {}
    assert not bucket.unfinished()


def test_without_torchrun_several_processes_are_refused(source: Path, bucket: Bucket) -> None:
    with pytest.raises(DcpconvError, match="only if torchrun has started them") as caught:
        convert(source, f"s3://{BUCKET}/alone", rank=1, of=2)
    assert "torchrun --nproc-per-node N -m dcpconv convert SRC DST" in str(caught.value)
    assert bucket.contents("alone") == {}
