"""Ranks that do not fit together, and results that are written by several of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dcpconv import convert, fingerprint
from dcpconv.conversion.convert import Progress
from dcpconv.conversion.report import ConversionReport
from dcpconv.core.errors import DcpconvError, NoSpaceError, SourceChangedError, TargetExistsError
from dcpconv.engine.manifests import MANIFEST
from dcpconv.engine.publish import RESULT, Staging
from dcpconv.engine.worlds.faults import GoneRankError
from dcpconv.engine.worlds.meeting import Meeting, State
from dcpconv.engine.worlds.seats import RankError, host
from support.checkpoints.check_cases import llama_shapes, write_hf
from support.worlds.conversions import in_threads, make_small, tree


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = write_hf(tmp_path / "source", llama_shapes(), files=2)
    for file in made.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            opened.write(os.urandom(5000))
    return made


def refused(found: list[Any], kind: type[DcpconvError]) -> list[DcpconvError]:
    """The errors of all ranks, which are of one kind."""
    assert [type(error) for error in found] == [kind] * len(found), found
    return found


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_source_that_looks_different_is_named(change: str, source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    file = sorted(other.glob("*.json"))[1]
    state = file.stat()
    if change == "size":
        file.write_text(file.read_text() + " ")
    os.utime(file, ns=(0, 0 if change == "time" else state.st_mtime_ns))
    found = in_threads(source, tmp_path / "out", 2, each={1: {"source": other}})
    how = {"time": "written at another time", "size": f"{state.st_size:,} bytes on rank 0"}
    for error in refused(found, SourceChangedError):
        text = str(error)
        assert f"source    {other}" in text
        assert f"rank      1 on {host()}" in text
        assert f"file      {file.name}: {how[change]}" in text
    assert left(tmp_path) == ["elsewhere", "source"]


def test_a_copy_of_the_source_that_kept_its_times_will_do(source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    found = in_threads(source, tmp_path / "out", 2, each={1: {"source": other}})
    convert(source, tmp_path / "one")
    assert isinstance(found[1], ConversionReport), found
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_options_that_differ_are_named(source: Path, tmp_path: Path) -> None:
    found = in_threads(source, tmp_path / "out", 2, form="dcp", each={1: {"chunks": 3}})
    for error in refused(found, RankError):
        assert "option    chunks: 1 on rank 0, 3" in str(error)
    assert left(tmp_path) == ["source"]


def test_results_that_differ_are_named(source: Path, tmp_path: Path) -> None:
    found = in_threads(source, tmp_path / "out", 2, form="dcp", each={1: {"only": "model"}})
    for error in refused(found, RankError):
        assert "result    __0_0.distcp" in str(error)


def test_a_rank_that_is_taken_is_refused(source: Path, tmp_path: Path) -> None:
    found = in_threads(source, tmp_path / "out", 3, each={2: {"rank": 1}})
    for error in refused(found, RankError):
        assert "rank 1 is taken by another process" in str(error)
    with pytest.raises(RankError, match="rank 1 is taken"):  # rank 2 comes late
        convert(source, tmp_path / "out", rank=2, of=3)
    convert(source, tmp_path / "out")
    assert left(tmp_path) == ["out", "source"]


def test_one_that_does_not_come_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpconv.engine.worlds.watching.PATIENCE", 0.5)
    with pytest.raises(GoneRankError, match="rank 1 has not come"):
        convert(source, tmp_path / "out", rank=0, of=2)
    with pytest.raises(GoneRankError, match="rank 0 has not come"):
        convert(source, tmp_path / "other", rank=1, of=2)
    assert not (tmp_path / "out").exists()
    # What it has written is not lost.
    in_threads(source, tmp_path / "out", 2)
    assert left(tmp_path) == ["out", "source"]


def test_a_rank_of_another_number_is_refused(source: Path, tmp_path: Path) -> None:
    found = in_threads(source, tmp_path / "out", 2, each={1: {"of": 3}})
    for error in refused(found, RankError):
        assert "1 of 3" in str(error)


def test_where_files_are_written_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpconv.conversion.worlds.planning.writes_anywhere", lambda _: False)
    found = in_threads(source, tmp_path / "out", 3, form="dcp", chunks=4)
    convert(source, tmp_path / "one", form="dcp", chunks=4)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    for report in found:
        assert isinstance(report, ConversionReport)
        assert any("each rank wrote whole ones" in note for note in report.notes)
        assert sum(1 for share in report.shares if share.nbytes) == 3


def test_what_one_rank_raises_all_raise(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcpconv.engine.worlds.meeting import Meeting

    note = Meeting.note_done

    def full(meeting: Meeting, record: dict[str, Any]) -> None:
        if meeting.seat.rank == 1:
            raise NoSpaceError("the disk filled up", [("file", "x")])
        note(meeting, record)

    monkeypatch.setattr(Meeting, "note_done", full)
    for error in refused(in_threads(source, tmp_path / "out", 3), NoSpaceError):
        assert "the disk filled up" in str(error)
    assert left(tmp_path) == ["source"]


def test_rank_0_counts_for_all(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    found = in_threads(source, tmp_path / "out", 3, each={0: {"progress": seen.append}})
    report = found[0]
    assert isinstance(report, ConversionReport)
    assert {at.total for at in seen} == {report.target.nbytes}
    assert [at.done for at in seen] == sorted(at.done for at in seen)


def test_a_target_that_exists_is_refused_by_all(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    refused(in_threads(source, tmp_path / "out", 2), TargetExistsError)
    found = in_threads(source, tmp_path / "out", 2, overwrite=True)
    assert all(isinstance(one, ConversionReport) for one in found), found
    assert left(tmp_path) == ["out", "source"]


def test_torchs_own_engine_is_for_one_process(tmp_path: Path) -> None:
    """What it makes of a file that only torch reads, all ranks go on with, as the hint says."""
    source, state = tmp_path / "old.pth", {"a": torch.randn(90, 70), "b": torch.randn(50)}
    torch.save(state, source, _use_new_zipfile_serialization=False)
    with pytest.raises(RankError, match="for one process") as caught:
        convert(source, tmp_path / "refused", rank=0, of=2, engine="torch")
    assert "`dcpconv convert SRC MADE --engine torch` in one process" in str(caught.value)
    convert(source, tmp_path / "made", engine="torch")
    found = in_threads(tmp_path / "made", tmp_path / "out", 2, form="hf", to="stored")
    assert all(isinstance(one, ConversionReport) for one in found), found
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() == state.keys()
    assert all(torch.equal(made[key], state[key]) for key in state)


@pytest.mark.parametrize("to", ["stored", "lingua"])
def test_rank_0_takes_the_fingerprint(to: str, source: Path, tmp_path: Path) -> None:
    one = convert(source, tmp_path / "one", form="dcp", to=to, fingerprint=True)
    found = in_threads(source, tmp_path / "out", 3, form="dcp", to=to, fingerprint=True)[0]
    assert isinstance(found, ConversionReport)
    assert found.fingerprint == one.fingerprint == fingerprint(source).digest
    assert found.notes == one.notes
    manifests = [tree(tmp_path / name)[MANIFEST] for name in ("out", "one")]
    assert manifests[0] == manifests[1]


def test_rank_0_reads_the_result_once_for_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compare it with what was written: by then all is known, and the manifest is there when
    the result is."""
    names: list[str] = []
    publish = Staging.publish

    def look(stage: Staging, files: Sequence[tuple[str, bytes]], **options: Any) -> None:
        names.extend(name for name, _ in files)
        publish(stage, files, **options)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Staging, "publish", look)
    monkeypatch.setattr("dcpconv.conversion.printing.fingerprint_of", refuse)
    monkeypatch.setattr("dcpconv.engine.hashing._chunk_digests", refuse)
    found = in_threads(source, tmp_path / "out", 2, form="dcp", fingerprint=True)[0]
    assert isinstance(found, ConversionReport)
    assert found.fingerprint_nbytes == found.target.nbytes
    assert MANIFEST in names


def test_a_dry_run_meets_nobody(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", rank=1, of=2, dry_run=True)
    assert report.is_dry_run
    assert left(tmp_path) == ["source"]


@pytest.mark.parametrize("asked", [True, False])
def test_digests_are_compared_where_a_fingerprint_is_asked_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, asked: bool
) -> None:
    """A byte that changes once its rank has read it back."""
    end = Meeting.end

    def flip(meeting: Meeting, state: State, record: dict[str, Any]) -> None:
        if meeting.seat.rank == 1 and state == "done":
            (name,) = (meeting.path.parent / RESULT).glob("*.distcp")
            data = bytearray(name.read_bytes())
            data[-1] ^= 1
            with name.open("r+b") as file:
                file.seek(len(data) - 1)
                file.write(data[-1:])
        end(meeting, state, record)

    monkeypatch.setattr(Meeting, "end", flip)
    found = in_threads(source, tmp_path / "out", 2, form="dcp", fingerprint=asked)
    if not asked:
        assert all(isinstance(one, ConversionReport) for one in found), found
        return
    for error in refused(found, DcpconvError):
        assert error.headline == "what was written to the result does not read back the same"
        ((piece,),) = [[value for label, value in error.facts if label == "piece"]]
        assert str(piece).startswith("__0_0.distcp: bytes ")
        assert str(piece).endswith(", rank 1")
    assert left(tmp_path) == ["source"]
