"""The Python in the pages runs, every block of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from support.machine.code_blocks import BLOCK, GIVEN, run_page
from support.machine.transcripts import prepare

ROOT = Path(__file__).parents[3]
PAGES = [
    page
    for page in (
        ROOT / "README.md",
        *sorted(ROOT.glob("docs/**/*.md")),
        *ROOT.glob("examples/*.md"),
    )
    if BLOCK.search(page.read_text())
]


def _named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """A process group of one: pages shard their models."""
    store = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pages")
    prepare(directory)
    shutil.copytree(directory / "weights/tiny-llama", directory / "weights/Llama-3-8B")
    return directory


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_every_block_runs(
    page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    shutil.copytree(prepared, here)
    monkeypatch.chdir(here)
    given = GIVEN.get(_named(page))
    names = {} if given is None else given(here)
    with alone(tmp_path):
        run_page(page.read_text(), names)


def test_pages_that_take_things_for_granted_have_blocks() -> None:
    assert set(GIVEN) <= {_named(page) for page in PAGES}
