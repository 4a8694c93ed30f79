"""Publishing is all or nothing, whatever happens in between."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcpconv.core.errors import NoSpaceError, TargetExistsError
from dcpconv.engine import exchanging
from dcpconv.engine.exchanging import exchange
from dcpconv.engine.publish import staging
from dcpconv.engine.space import check_space
from dcpconv.engine.targets import TargetError, check_target
from support.machine.mounts import tmpfs

OLD, NEW = {"weights": b"old", "sub/x": b"old too"}, {"weights": b"new", ".metadata": b"commit"}


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def convert(target: Path, *, overwrite: bool = False) -> None:
    with staging(target, overwrite=overwrite, is_file=False) as stage:
        write(stage.path, {"weights": b"new"})
        stage.publish([(".metadata", b"commit")])


@contextmanager
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(exchanging, "exchange", lambda *_: False)
        yield


def test_an_absent_target_appears_whole_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    with staging(target, overwrite=False, is_file=False) as stage:
        write(stage.path, {"weights": b"new"})
        assert not target.exists()
        assert stage.path.parent.parent == target.parent
        stage.publish([(".metadata", b"commit")])
        assert tree(target) == NEW

    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_single_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    with staging(target, overwrite=False, is_file=True) as stage:
        (stage.path / "model.pth").write_bytes(b"new")
        stage.publish()

    assert tree(tmp_path) == {"model.pth": b"new"}


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "directory"])
def test_an_existing_target_is_refused_before_any_work(tmp_path: Path, *, is_file: bool) -> None:
    target = tmp_path / "out"
    if is_file:
        target.write_bytes(b"old")
    else:
        write(target, OLD)
    with (
        pytest.raises(TargetExistsError, match="--overwrite"),
        staging(target, overwrite=False, is_file=is_file),
    ):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_counts_as_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    convert(target)

    assert tree(tmp_path) == {"out/weights": b"new", "out/.metadata": b"commit"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwriting_replaces_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_exchange: bool
) -> None:
    target = write(tmp_path / "out", OLD)
    if can_exchange:
        convert(target, overwrite=True)
    else:
        with no_exchange(monkeypatch):
            convert(target, overwrite=True)

    assert tree(tmp_path) == {f"out/{name}": data for name, data in NEW.items()}


def test_overwriting_a_file_replaces_it(tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    target.write_bytes(b"old")
    with staging(target, overwrite=True, is_file=True) as stage:
        (stage.path / "model.pth").write_bytes(b"new")
        stage.publish()

    assert tree(tmp_path) == {"model.pth": b"new"}


def test_a_target_that_appears_meanwhile_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staging(target, overwrite=False, is_file=False) as stage:
        write(target, OLD)
        with pytest.raises(TargetExistsError):
            stage.publish()

    assert tree(tmp_path) == {f"out/{name}": data for name, data in OLD.items()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [{}, OLD], ids=["absent", "existing"])
def test_an_exception_leaves_the_target_as_it_was(
    tmp_path: Path, error: type[BaseException], old: dict[str, bytes]
) -> None:
    write(tmp_path / "out", old)

    def fail() -> None:
        with staging(tmp_path / "out", overwrite=True, is_file=False) as stage:
            write(stage.path, {"weights": b"new"})
            raise error

    with pytest.raises(error):
        fail()
    assert tree(tmp_path) == {f"out/{name}": data for name, data in old.items()}
    assert not list(tmp_path.glob(".*"))


def test_a_rename_that_fails_half_way_brings_the_old_target_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write(tmp_path / "out", OLD)
    rename = Path.rename

    def fail(self: Path, other: Path) -> Path:
        if self.name == "result":
            raise OSError(5, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with no_exchange(monkeypatch), pytest.raises(TargetError, match="renamed into place"):
        convert(target, overwrite=True)

    assert tree(tmp_path) == {f"out/{name}": data for name, data in OLD.items()}


def test_a_crash_between_two_renames_is_repaired_by_the_next_run(tmp_path: Path) -> None:
    write(tmp_path / ".out.dcpconv-staging" / "previous", OLD)
    write(tmp_path / ".out.dcpconv-staging" / "result", {"weights": b"half"})
    with pytest.raises(TargetExistsError):
        convert(tmp_path / "out")
    assert tree(tmp_path) == {f"out/{name}": data for name, data in OLD.items()}

    convert(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == NEW


STUCK = """
import sys, time
from pathlib import Path
from dcpconv.engine.publish import staging
with staging(Path(sys.argv[1]), overwrite=True, is_file=False) as stage:
    (stage.path / "weights").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def stuck(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of a conversion."""
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("old", [{}, OLD], ids=["absent", "existing"])
def test_after_kill_nine_the_next_run_starts_clean(tmp_path: Path, old: dict[str, bytes]) -> None:
    target = write(tmp_path / "out", old)
    with stuck(target) as process:
        process.kill()
        process.wait()
    assert tree(target) == old if old else not target.exists()
    assert (tmp_path / ".out.dcpconv-staging" / "result" / "weights").exists()

    convert(target, overwrite=True)
    assert tree(tmp_path) == {f"out/{name}": data for name, data in NEW.items()}


def test_ctrl_c_removes_what_was_written(tmp_path: Path) -> None:
    target = write(tmp_path / "out", OLD)
    with stuck(target) as process:
        process.send_signal(signal.SIGINT)
        process.wait()

    assert tree(tmp_path) == {f"out/{name}": data for name, data in OLD.items()}


def test_a_second_converter_is_told_who_is_first(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with stuck(target) as process:
        with pytest.raises(TargetExistsError, match="another conversion") as caught:
            convert(target)
        assert ("process", str(process.pid)) in caught.value.facts
        process.kill()
        process.wait()
    convert(target)
    assert tree(target) == NEW


def test_a_second_converter_of_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with (
        staging(tmp_path / "out", overwrite=False, is_file=False),
        pytest.raises(TargetExistsError, match="another conversion"),
    ):
        convert(tmp_path / "out")


def test_many_converters_at_once_publish_one_whole_result_each(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from dcpconv.core.errors import TargetExistsError
from dcpconv.engine.publish import staging
for turn in range(30):
    try:
        with staging(Path(sys.argv[1]), overwrite=True, is_file=False) as stage:
            for name in "abc":
                (stage.path / name).write_text(f"{sys.argv[2]} {turn}")
            stage.publish()
    except TargetExistsError:
        pass
"""
    target = tmp_path / "out"
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(target), str(number)])
        for number in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(tree(target)) == ["a", "b", "c"]
    assert len(set(tree(target).values())) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_symbolic_link_keeps_pointing_to_what_is_replaced(tmp_path: Path) -> None:
    real = write(tmp_path / "disk" / "real", OLD)
    link = tmp_path / "latest"
    link.symlink_to(real)
    convert(link, overwrite=True)

    assert link.is_symlink()
    assert tree(real) == NEW


def test_places_that_cannot_be_targets_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "models" / "source", OLD)
    file = tmp_path / "file"
    file.write_bytes(b"")
    monkeypatch.chdir(write(tmp_path / "here" / "below", OLD))
    cases = [
        (source, "it is the source"),
        (write(source / "part", OLD), "part of the source"),
        (tmp_path / "models", "would remove the source"),
        (file / "out", "is not a directory"),
        (Path.cwd(), "contains the current directory"),
        (tmp_path / "here", "contains the current directory"),
        (Path("/"), "would remove the source"),
        (Path("/proc"), "mount point"),
    ]
    before = tree(source)
    for target, reason in cases:
        with pytest.raises(TargetError, match=reason):
            check_target(target, overwrite=True, is_file=False, source=source)
    assert tree(source) == before


def test_a_link_to_the_source_is_the_source(tmp_path: Path) -> None:
    source = write(tmp_path / "source", OLD)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(TargetError, match="it is the source"):
        check_target(tmp_path / "link", overwrite=True, is_file=False, source=source)


def test_beside_the_source_is_fine(tmp_path: Path) -> None:
    source = write(tmp_path / "source", OLD)
    check_target(tmp_path / "source-dcp", overwrite=False, is_file=False, source=source)
    check_target(tmp_path / "out", overwrite=False, is_file=False, source=source / "weights")


@pytest.mark.parametrize("is_file", [True, False])
def test_a_file_is_not_replaced_by_a_directory_nor_the_other_way(
    tmp_path: Path, *, is_file: bool
) -> None:
    target = tmp_path / "out"
    if is_file:
        target.mkdir()
    else:
        target.write_bytes(b"old")
    with pytest.raises(TargetExistsError, match="choose another name"):
        check_target(target, overwrite=True, is_file=is_file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_parent_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TargetError, match="not writable"):
        check_target(tmp_path / "out", overwrite=False, is_file=False)
    tmp_path.chmod(0o700)


def test_a_disk_that_fills_up_while_committing_leaves_nothing(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "1m") as disk:
        with (
            pytest.raises(NoSpaceError),
            staging(disk / "out", overwrite=False, is_file=False) as stage,
        ):
            stage.publish([(".metadata", bytes(2 << 20))])
        assert not list(disk.iterdir())


def test_space_is_checked_before_starting(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "1m") as disk:
        check_space(disk / "not" / "yet", 1 << 19)
        check_space(disk, 1 << 40, reflinkable=1 << 40)
        with pytest.raises(NoSpaceError, match=r"needed    3\.00 GiB\n  free      0\.00 GiB"):
            check_space(disk / "not" / "yet", 3 << 30)


def test_exchange_swaps_or_says_that_it_cannot(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", OLD), write(tmp_path / "other", NEW)
    if exchange(one, other):
        assert (tree(one), tree(other)) == (NEW, OLD)
    else:
        assert (tree(one), tree(other)) == (OLD, NEW)


def test_exchange_with_something_absent_is_an_error(tmp_path: Path) -> None:
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("no renameat2 here")
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "absent", tmp_path / "absent too")
