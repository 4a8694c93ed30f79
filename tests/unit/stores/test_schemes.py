"""A URL is never taken for a path, whichever command or function is given it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dcpconv import (
    CheckpointReader,
    check,
    convert,
    dcp_to_torch_save,
    find_checkpoints,
    load_init_weights,
    torch_save_to_dcp,
)
from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.runs.carrying.carrying import convert_run
from dcpconv.stores.schemes import SchemeError, path_of, refuse_scheme
from dcpconv.stores.store import StoreError
from support.checkpoints.check_cases import llama_shapes, write_hf

URLS = ["file:///tmp/x", "foo://x", "zip://x.zip", "blockcache://x"]
"""What no store serves; of what one serves, ``test_buckets`` and its neighbours tell."""

SERVED = ["s3://bucket/x", "gs://bucket/x", "abfss://c@account/x", "https://host/x"]

COMMANDS = [
    ["convert", "{url}", "out"],
    ["convert", "here", "{url}"],
    ["convert", "here", "{url}", "--form", "torch"],
    ["convert", "here", "{url}", "--engine", "torch"],
    ["convert", "here", "out", "--assets", "{url}"],
    ["convert", "here", "out", "--adapter", "{url}"],
    ["convert", "here", "out", "--keymap", "{url}"],
    ["check", "{url}"],
    ["check", "here", "--against", "{url}"],
    ["inspect", "{url}"],
    ["keys", "{url}"],
    ["keys", "here", "-o", "{url}"],
    ["params", "{url}"],
    ["params", "here", "-o", "{url}"],
    ["families", "check", "{url}"],
    ["families", "new", "{url}"],
    ["runs", "list", "{url}"],
    ["runs", "latest", "{url}"],
    ["runs", "resolve", "{url}", "latest"],
    ["runs", "verify", "{url}"],
    ["runs", "prune", "{url}", "--keep-last", "1"],
    ["runs", "carry", "{url}", "out", "--to", "dcp"],
    ["runs", "carry", "here", "{url}", "--to", "dcp"],
]


@pytest.mark.parametrize("url", URLS)
def test_every_command_says_what_works(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "here", llama_shapes())
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        found = CliRunner().invoke(app, [word.format(url=url) for word in command])
        assert found.exit_code == 2, (command, found.output)
        assert "is no place that dcpconv reads or writes" in found.output, command
        assert "name the path" in found.output
        assert [path.name for path in tmp_path.iterdir()] == ["here"], command


ON_A_DISK = [
    ["convert", "here", "out", "--keymap", "{url}"],
    ["check", "here", "-o", "{url}"],
    ["keys", "here", "-o", "{url}"],
    ["params", "here", "-o", "{url}"],
    ["families", "check", "{url}"],
    ["families", "new", "{url}"],
    ["runs", "prune", "{url}", "--keep-last", "1"],
    ["runs", "strip", "{url}"],
    ["runs", "carry", "{url}", "out", "--to", "dcp"],
    ["runs", "carry", "here", "{url}", "--to", "dcp"],
]


@pytest.mark.parametrize("url", SERVED)
def test_what_is_read_and_written_on_a_disk_only_says_so(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "here", llama_shapes())
    monkeypatch.chdir(tmp_path)
    for command in ON_A_DISK:
        found = CliRunner().invoke(app, [word.format(url=url) for word in command])
        assert found.exit_code == 2, command
        assert "is no place that dcpconv reads or writes here" in found.output, command
        assert "Traceback" not in found.output, command
        assert [path.name for path in tmp_path.iterdir()] == ["here"], command


def test_a_store_whose_package_is_absent_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dcpconv.stores.buckets.find_spec", lambda _: None)
    with pytest.raises(StoreError, match="not installed") as caught:
        path_of("s3://bucket/x")
    assert caught.value.hint == "pip install 'dcpconv[remote]'"


def test_a_url_with_a_secret_is_refused_without_saying_it() -> None:
    pytest.importorskip("obstore")
    for url in ("https://me:hush@host/x", "https://host/x?token=hush"):
        with pytest.raises(StoreError) as caught:
            path_of(url)
        assert "hush" not in str(caught.value)
        assert "host/x" in str(caught.value)


@pytest.mark.parametrize("as_path", [False, True])
def test_every_function_says_so_too(
    as_path: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_hf(tmp_path / "here", llama_shapes())
    monkeypatch.chdir(tmp_path)
    url = Path("foo://bucket/x") if as_path else "foo://bucket/x"
    attempts = [
        lambda: convert(url, "out"),
        lambda: convert("here", url),
        lambda: convert("here", url, form="torch", dry_run=False),
        lambda: check(url),
        lambda: open_checkpoint(url),
        lambda: find_checkpoints(url),
        lambda: convert_run(url, "out", to="dcp"),
        lambda: dcp_to_torch_save(url, "out.pt"),
        lambda: dcp_to_torch_save("here", url),
        lambda: torch_save_to_dcp(url, "out"),
        lambda: load_init_weights(_model(), url),
        _reading(url),
    ]
    for attempt in attempts:
        with pytest.raises(DcpconvError) as caught:
            attempt()
        assert isinstance(caught.value, SchemeError), caught.value
        assert [path.name for path in tmp_path.iterdir()] == ["here"]


def _reading(url: str | Path) -> Callable[[], object]:
    reader: Any = CheckpointReader(url)
    read: Callable[[], object] = reader.read_metadata
    return read


def _model() -> torch.nn.Module:
    return torch.nn.Linear(2, 3)


def test_what_is_a_path_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step:10").mkdir()
    (tmp_path / "run:1/x").mkdir(parents=True)
    for name in ("a/b", "C:/x", "./s3://x", "run:1/x", "step:10", "hf://org/name", "org/name@v1"):
        refuse_scheme(name)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///tmp/x", "/tmp/x"),
        ("file://localhost/tmp/x", "/tmp/x"),
        ("FILE:/tmp/x", "/tmp/x"),
    ],
)
def test_the_hint_for_a_file_names_its_path(url: str, path: str) -> None:
    with pytest.raises(SchemeError) as caught:
        refuse_scheme(url)
    assert caught.value.hint == f"name the path itself: {path}"
