"""What follows ``--resume`` is understood or refused; nothing else ever starts a run afresh."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

import pytest

from dcpconv import resolve_checkpoint
from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.runs import RunError
from support.runs import run_dirs
from support.runs.run_dirs import hf_trainer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (100, 200, 300):
        hf_trainer(tmp_path / "out", step)
    (tmp_path / "out" / "checkpoint-300" / "trainer_state.json").unlink()
    return tmp_path / "out"


NOTHING = [None, "no", "NO", "none", "None", "false", False]


@pytest.mark.parametrize("wanted", NOTHING, ids=repr)
def test_no_is_a_fresh_start(wanted: str | None, run: Path) -> None:
    assert resolve_checkpoint(wanted, run) is None


UNDERSTOOD = [
    ("latest", 200),
    ("auto", 200),
    ("yes", 200),
    (True, 200),
    (100, 100),
    ("100", 100),
    ("0100", 100),
    ("checkpoint-100", 100),
    ("./checkpoint-100", 100),
    (Path("checkpoint-100"), 100),
    ("..\\out\\checkpoint-100", 100),
    ("../out/checkpoint-100/", 100),
]


@pytest.mark.parametrize(("wanted", "step"), UNDERSTOOD, ids=[repr(row[0]) for row in UNDERSTOOD])
def test_what_is_understood(wanted: str, step: int, run: Path) -> None:
    found = resolve_checkpoint(wanted, run)

    assert found is not None
    assert found.step == step


def test_a_typed_run_directory_may_have_the_other_systems_separators(run: Path) -> None:
    found = resolve_checkpoint("latest", str(PureWindowsPath(run)))

    assert found is not None
    assert found.path == run / "checkpoint-200"


REFUSED = [
    ("newest", "cannot tell"),
    ("", "cannot tell"),
    ("-5", "cannot tell"),
    ("1e3", "cannot tell"),
    (150, "has no step 150"),
    (-1, "has no step -1"),
    (300, "not complete"),
    ("checkpoint-300", "not complete"),
    ("out/checkpoint-150", "no such checkpoint"),
    ("C:\\colab\\out\\checkpoint-150", "no such checkpoint"),
]


@pytest.mark.parametrize(("wanted", "why"), REFUSED, ids=[repr(row[0]) for row in REFUSED])
def test_what_is_not_understood_is_an_error_that_says_what_is(
    wanted: str, why: str, run: Path
) -> None:
    with pytest.raises(DcpconvError, match=why) as caught:
        resolve_checkpoint(wanted, run)

    if why == "cannot tell":
        understood = [str(value) for label, value in caught.value.facts if label == "understood"]
        words = {line.partition(":")[0] for line in understood}
        assert words == {
            "latest",
            "auto",
            "latest pretrain",
            "best",
            "a number",
            "a path",
            "no, none",
        }


def test_auto_starts_afresh_where_latest_refuses(tmp_path: Path) -> None:
    assert resolve_checkpoint("auto", tmp_path) is None
    assert resolve_checkpoint("auto", tmp_path / "absent") is None
    with pytest.raises(RunError, match="no complete checkpoint"):
        resolve_checkpoint("latest", tmp_path)


def test_a_step_of_two_layouts_is_not_guessed(run: Path) -> None:
    run_dirs.torchtitan(run, 100)

    with pytest.raises(RunError, match="more than once"):
        resolve_checkpoint(100, run)


def test_a_path_stored_elsewhere_gets_a_hint(run: Path) -> None:
    with pytest.raises(NotACheckpointError) as caught:
        resolve_checkpoint("/content/drive/out/checkpoint-200", run)

    assert str(run / "checkpoint-200") in (caught.value.hint or "")


def test_a_path_needs_no_name_of_a_step(run: Path) -> None:
    best = (run / "checkpoint-200").rename(run / "checkpoint-best")

    found = resolve_checkpoint(best, "elsewhere")

    assert found is not None
    assert (found.step, found.layout) == (None, "hf-trainer")
    with pytest.raises(NotACheckpointError, match="no checkpoint of a run"):
        resolve_checkpoint(run, "elsewhere")


def test_a_minimind_file_is_a_path_and_its_step_a_number(tmp_path: Path) -> None:
    path = run_dirs.minimind(tmp_path, 40)

    for wanted in (path, path.name, 40, "latest"):
        found = resolve_checkpoint(wanted, tmp_path)
        assert found is not None
        assert found.path == path


PATHS = ["checkpoint-100", "checkpoint-300", "checkpoint-150", "pretrain_96_resume.pth"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("spelling", ["path", "text", "backslashes", "relative"])
def test_an_explicit_path_never_reads_the_run_directory(
    name: str, spelling: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dirs.minimind(run, 40)
    read: list[Path] = []

    def counted(function: object) -> object:
        def call(path: str | os.PathLike[str] = ".", *rest: object) -> object:
            read.append(Path(path))
            return function(path, *rest)  # type: ignore[operator]

        return call

    for place, function in ((os, "scandir"), (os, "listdir"), (Path, "iterdir"), (Path, "glob")):
        monkeypatch.setattr(place, function, counted(getattr(place, function)))
    spellings: dict[str, str | Path] = {
        "path": run / name,
        "text": str(run / name),
        "backslashes": str(PureWindowsPath(run / name)),
        "relative": Path(name),
    }
    wanted = spellings[spelling]

    try:
        resolve_checkpoint(wanted, run)
    except DcpconvError:
        assert name in {"checkpoint-150", "checkpoint-300"}

    assert all(path == run / name for path in read), read
    assert len(read) == (name in {"checkpoint-100", "checkpoint-300"})


def test_the_count_above_does_count(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    scandir = os.scandir

    def counted(path: str) -> object:
        read.append(Path(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)

    resolve_checkpoint("latest", run)

    assert run in read
