"""Storages that loading allocates are in huge pages, where whole ones fit."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dcpconv.loading import materialise, pages
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.pages import SIZE, use_huge_pages


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
