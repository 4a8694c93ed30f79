"""Storages that loading allocates are in huge pages, where whole ones fit; and pages at once."""

from __future__ import annotations

import mmap
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dcpconv.loading import materialise, pages, reading
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.pages import SIZE, populate, use_huge_pages


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Every ``(address, bytes, advice)`` that the system is given from now on."""
    found: list[tuple[int, int, int]] = []

    def advise(address: int, nbytes: int, advice: int) -> int:
        found.append((address, nbytes, advice))
        return 0

    monkeypatch.setattr(pages, "_advise", lambda: advise)
    return found


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
@pytest.mark.parametrize("nbytes", [SIZE // 2, SIZE, 3 * SIZE, 5 * SIZE + 4097])
def test_only_whole_pages_inside_a_storage(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    found = asked(monkeypatch)
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    assert use_huge_pages(tensor) == bool(found)
    assert len(found) >= (nbytes >= 2 * SIZE)
    for address, length, advice in found:
        assert address % SIZE == length % SIZE == 0
        assert tensor.data_ptr() <= address
        assert address + length <= tensor.data_ptr() + nbytes < address + length + SIZE
        assert advice == mmap.MADV_HUGEPAGE


def test_what_is_not_in_memory_of_the_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch)
    assert not use_huge_pages(torch.empty(4 * SIZE, device="meta"))
    assert not found


def test_a_system_without_them_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_advise", lambda: None)
    assert not use_huge_pages(torch.empty(4 * SIZE))


def test_loading_asks_for_what_it_allocates_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"weight": torch.randn(2048, 1024), "bias": torch.randn(2048)}
    torch.save(weights, tmp_path / "weights.pt")
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(materialise, "use_huge_pages", lambda t: seen.append(tuple(t.shape)))
    live = nn.Linear(1024, 2048)
    load_init_weights(live, tmp_path / "weights.pt", huge_pages=True)
    assert seen == []
    with torch.device("meta"):
        empty, small = nn.Linear(1024, 2048), nn.Linear(1024, 2048)
    load_init_weights(small, tmp_path / "weights.pt")
    assert seen == []  # only if it is asked for
    load_init_weights(empty, tmp_path / "weights.pt", huge_pages=True)
    assert seen == [(2048, 1024), (2048,)]
    assert torch.equal(empty.weight, weights["weight"])


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_the_system_says_that_it_was_asked() -> None:
    tensor = torch.empty(8 * SIZE, dtype=torch.uint8)
    if not use_huge_pages(tensor):
        pytest.skip("the kernel was built without huge pages")
    middle = tensor.data_ptr() + 4 * SIZE
    flags = ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert " hg" in flags


def resident(tensor: torch.Tensor) -> int:
    """Pages that a tensor's memory has."""
    page = mmap.PAGESIZE
    begin = tensor.data_ptr() // page
    count = -(-(tensor.data_ptr() + tensor.nbytes) // page) - begin
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * begin)
        words = memoryview(file.read(8 * count)).cast("Q")
    return sum(word >> 63 for word in words)


@pytest.fixture
def has_populate() -> None:
    """Skips where the kernel does not have it."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if sys.platform != "linux" or not release or (int(release[1]), int(release[2])) < (5, 14):
        pytest.skip("Linux 5.14 and later give pages at once")


@pytest.mark.usefixtures("has_populate")
def test_new_memory_gets_its_pages_at_once_and_other_memory_is_left_alone() -> None:
    fresh = mmap.mmap(-1, 4 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(fresh, dtype=torch.uint8)[1:-1]
    assert resident(tensor) == 0
    assert populate(tensor)
    assert resident(tensor) >= 4 * SIZE // mmap.PAGESIZE
    tensor.fill_(7)
    assert not populate(tensor)
    assert int(tensor.sum(dtype=torch.int64)) == 7 * (4 * SIZE - 2)


def test_loading_asks_for_the_pages_of_what_it_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"weight": torch.randn(2048, 1024), "bias": torch.randn(2048)}
    torch.save(weights, tmp_path / "weights.pt")
    asked: list[int] = []
    monkeypatch.setattr(reading, "populate", lambda t: asked.append(t.nbytes))
    with torch.device("meta"):
        empty = nn.Linear(1024, 2048)
    load_init_weights(empty, tmp_path / "weights.pt")
    assert sum(asked) == 2048 * 1025 * 4


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.empty(4 * SIZE, device="meta"), id="no-memory"),
        pytest.param(torch.empty(64, dtype=torch.uint8), id="small"),
        pytest.param(torch.empty(2048, 4096).t(), id="strided"),
    ],
)
def test_pages_are_not_asked_for_where_they_gain_nothing(tensor: torch.Tensor) -> None:
    assert not populate(tensor)


def test_pages_at_once_on_another_system_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_libc", lambda: None)
    assert not populate(torch.empty(4 * SIZE))
