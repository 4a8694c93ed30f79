"""Tiles on their way to a device, against a double of one whose copies end as late as they may.

The double stands in for CUDA: its memory is that of this process, but nothing arrives before
somebody waits for it, and a copy that is still to come takes what is in the tile by then.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dcpconv.loading import reading, staging
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.staging import BUFFER, RING, Desk
from support.models.hf_models import save_hf, tiny


@dataclass
class Pending:
    """A copy that happens when it is waited for, and not before."""

    source: Tensor
    into: Tensor
    has_ended: bool = False

    def synchronize(self) -> None:
        if not self.has_ended:
            self.into.copy_(self.source)
            self.has_ended = True


@dataclass
class Late:
    """A device that is as slow as it may be, for one thread."""

    made: list[int] = field(default_factory=list)
    copies: list[Pending] = field(default_factory=list)
    began: int = 0
    ended: int = 0
    most_under_way: int = 0
    thread: int = 0

    def begin(self) -> None:
        self.began += 1
        self.thread = threading.get_ident()

    def buffer(self, nbytes: int) -> Tensor:
        self.made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, source: Tensor, into: Tensor) -> Pending:
        assert threading.get_ident() == self.thread
        self.copies.append(Pending(source, into))
        under_way = sum(not copy.has_ended for copy in self.copies)
        self.most_under_way = max(self.most_under_way, under_way)
        return self.copies[-1]

    def finish(self) -> None:
        self.ended += 1
        for copy in self.copies:
            copy.synchronize()


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """Every destination is on a device; returns those that were made, one per thread."""
    made: list[Late] = []

    def device_of(_tensor: Tensor) -> Late:
        made.append(Late())
        return made[-1]

    monkeypatch.setattr(reading, "is_beyond", lambda _tensor: True)
    monkeypatch.setattr(reading, "device_of", device_of)
    return made


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same", "cast"])
def test_every_byte_arrives_although_copies_are_late(
    tmp_path: Path, devices: list[Late], dtype: torch.dtype, jobs: int
) -> None:
    right = {f"w.{n}": torch.randn(700, 1030) for n in range(9)}
    torch.save(right, tmp_path / "weights.pt")
    model = nn.Module()
    model.add_module("w", nn.ParameterList(torch.zeros(700, 1030, dtype=dtype) for _ in right))

    load_init_weights(model, tmp_path / "weights.pt", jobs=jobs)

    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, right[key].to(dtype)), key
    assert len(devices) == jobs
    assert all((one.began, one.ended) == (1, 1) for one in devices)
    used = [one for one in devices if one.copies]
    assert sum(len(one.copies) for one in used) >= 9
    for one in used:
        kinds = 1 if dtype is torch.float32 else 2  # a cast has a tile of its own
        assert len(one.made) <= kinds * RING
        assert max(one.made) <= BUFFER
        assert one.most_under_way <= RING  # bounded, and yet more than one at a time
    if jobs == 1:
        assert used[0].most_under_way > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same", "cast"])
def test_small_tensors_share_tiles_although_copies_are_late(
    tmp_path: Path, devices: list[Late], dtype: torch.dtype
) -> None:
    right = {f"w.{n}": torch.randn(30 + n % 7, 10) for n in range(4000)}
    torch.save(right, tmp_path / "weights.pt")
    model = nn.Module()
    empty = [torch.zeros(weight.shape, dtype=dtype) for weight in right.values()]
    model.add_module("w", nn.ParameterList(empty))
    load_init_weights(model, tmp_path / "weights.pt", jobs=1)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, right[key].to(dtype)), key
    (device,) = devices
    kinds = 1 if dtype is torch.float32 else 2
    assert len(device.made) <= kinds * RING
    assert max(device.made) <= BUFFER
    assert len(device.copies) == 4000


def test_a_tile_is_not_read_into_before_it_has_been_copied() -> None:
    device = Late()
    desk = Desk(device)
    desk.begin()
    into = torch.zeros(2 * RING, dtype=torch.uint8)
    for number in range(2 * RING):
        desk.next_tile()
        tile = desk.tile("read", 1)
        tile.fill_(number + 1)  # would change what a late copy takes, were it still under way
        desk.deliver(tile, into[number : number + 1])
    desk.finish()
    assert into.tolist() == [*range(1, 2 * RING + 1)]
    assert len(device.made) == RING


def test_relabelled_and_strided_weights_arrive_too(tmp_path: Path, devices: list[Late]) -> None:
    from support.worlds.sharded_models import build, lingua_weights

    hf = save_hf(tiny("llama"), tmp_path / "hf")
    model = build(meta=False)
    load_init_weights(model, hf, jobs=2)
    right = lingua_weights(tiny("llama").state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, right[key]), key
    assert sum(len(one.copies) for one in devices) >= 30


def test_memory_of_this_process_needs_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_tensor: Tensor) -> None:
        raise AssertionError("a device for memory of this process")

    monkeypatch.setattr(staging, "Cuda", never)
    assert not staging.is_beyond(torch.empty(3))
