"""Files of this machine: regular ones only, and the same ones from first to last."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dcpconv import check
from dcpconv.core.errors import DcpconvError, FormatError, SourceChangedError
from dcpconv.families.keymaps import read_keymap
from dcpconv.formats.opening import open_checkpoint
from dcpconv.stores.local import Sources, identity_of, open_regular, read_regular


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def listener(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


KINDS = [pipe, endless, directory, listener]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("make", KINDS)
def test_only_regular_files_are_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises((FormatError, OSError)):
        open_regular(tmp_path / "x")


def test_a_file_larger_than_its_kind_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"12345")
    assert read_regular(file, most=5) == b"12345"
    with pytest.raises(FormatError, match="at most 4 bytes"):
        read_regular(file, most=4)


NAMES = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pth",
    ".metadata",
    "config.json",
    "params.json",
    "keys.json",
    "consolidated.00.pth",
]


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_a_pipe_or_reads_a_device(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(DcpconvError):
            open_checkpoint(source)
        with suppress(DcpconvError):
            assert not check(source)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [pipe, endless, directory])
def test_a_table_is_a_regular_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "mine.toml")
    with pytest.raises(DcpconvError, match=r"mine\.toml"):
        read_keymap(tmp_path / "mine.toml")


def test_a_file_opened_again_must_be_the_same(tmp_path: Path) -> None:
    """At most one file stays open here, so each turn opens anew."""
    for name in "ab":
        (tmp_path / name).write_bytes(b"1234")
    with Sources(tmp_path, limit=1) as sources:
        for name in "aba":
            with sources.open(name):
                pass
        sources.require_unchanged()
        (tmp_path / "b").write_bytes(b"12345")
        with pytest.raises(SourceChangedError, match="4 bytes before, 5 now"), sources.open("b"):
            pass
        with pytest.raises(SourceChangedError) as caught:
            sources.require_unchanged()
    assert [label for label, _ in caught.value.facts] == ["changed"]


def test_every_changed_file_is_listed(tmp_path: Path) -> None:
    known = {}
    for name in "abc":
        (tmp_path / name).write_bytes(b"1234")
        known[name] = identity_of(tmp_path / name)
    (tmp_path / "a").unlink()
    (tmp_path / "c").rename(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"1234")
    with Sources(tmp_path, identities=known) as sources, pytest.raises(SourceChangedError) as all_:
        sources.require_unchanged()
    assert [str(value).rpartition(": ")[2] for _, value in all_.value.facts] == [
        "it is gone",
        "another file has its name",
        "another file has its name",
    ]
