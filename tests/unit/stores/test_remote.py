"""A path in a store answers like a path, and ranges are asked for as few times as they can be."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from dcpconv.core.errors import SourceChangedError
from dcpconv.stores import fetching
from dcpconv.stores.fetching import coalesced, fetch
from dcpconv.stores.ranged import Heading, Ranged
from dcpconv.stores.remote import Origin, RemotePath
from dcpconv.stores.store import (
    Buffer,
    ChangedError,
    Info,
    Store,
    StoreError,
    TransientError,
    without_secrets,
)

DATA = bytes(random.Random(0).randbytes(3 << 20))


class Held(Store):
    """A store in memory; ``answers`` are raised first, one a request."""

    def __init__(self, files: dict[str, bytes], answers: Iterable[Exception] = ()) -> None:
        super().__init__("s3://bucket")
        self.files = files
        self.answers = list(answers)
        self.asked: list[tuple[str, int, int]] = []

    def _list(self, prefix: str) -> Iterable[tuple[str, Info | None]]:
        above = f"{prefix}/" if prefix else ""
        found: dict[str, Info | None] = {}
        for key, data in self.files.items():
            if key.startswith(above):
                name, slash, _ = key[len(above) :].partition("/")
                found[name] = None if slash else Info(len(data), "tag")
        return found.items()

    def _look(self, key: str) -> Info | None:
        return Info(len(self.files[key]), "tag") if key in self.files else None

    def get(self, key: str, offset: int, nbytes: int, info: Info) -> Buffer:
        del info
        self.asked.append((key, offset, nbytes))
        if self.answers:
            raise self.answers.pop(0)
        return self.files[key][offset : offset + nbytes]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in ("x/a.safetensors", "x/config.json", "x/sub/b.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(DATA[:100])
    return tmp_path


def test_it_answers_as_a_directory_of_this_machine_does(here: Path) -> None:
    files = {str(f.relative_to(here)): f.read_bytes() for f in here.rglob("*") if f.is_file()}
    there = RemotePath(Origin(Held(files), Path))
    for name in ("x", "x/a.safetensors", "x/sub", "x/sub/b.pth", "x/no", "x/a.safetensors/no"):
        one, other = here / name, there / name
        assert (one.is_dir(), one.is_file(), one.exists(), one.name, one.suffix, one.stem) == (
            *(other.is_dir(), other.is_file(), other.exists()),
            *(other.name, other.suffix, other.stem),
        )
        assert str(one.parent.relative_to(here)) == (str(other.parent.relative_to(there)) or ".")
        depth = name.count("/")
        above = [str(p.relative_to(here)) for p in [*one.parents][:depth]]
        assert above == [str(p.relative_to(there)) for p in [*other.parents][:depth]]
    for pattern in ("*", "*.json", "s*/*.pth", "*/"):
        found = {str(p.relative_to(there)) for p in (there / "x").glob(pattern)}
        # Before Python 3.11 "*/" also finds files.
        expected = [p for p in (here / "x").glob(pattern) if p.is_dir() or pattern[-1] != "/"]
        assert found == {str(p.relative_to(here)) for p in expected}
    file = there / "x/config.json"
    assert file.read_bytes() == (here / "x/config.json").read_bytes()
    assert file.stat().st_size == 100
    with file.open("rb") as opened:
        opened.seek(-7, 2)
        assert opened.read() == DATA[93:100]
    assert str(file) == "s3://bucket/x/config.json"
    assert file == RemotePath(file.origin, "x/config.json")
    with pytest.raises(ValueError, match="is not below"):
        file.relative_to(there / "y")
    with pytest.raises(FileNotFoundError):
        (there / "x/no").read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_requests_cover_what_is_wanted_and_little_else(seed: int) -> None:
    rng = random.Random(seed)
    wanted = [(rng.randrange(10_000), rng.randrange(1, 300)) for _ in range(rng.randrange(1, 40))]
    gap, part = rng.randrange(200), rng.randrange(1, 2000)
    requests = [*coalesced(wanted, gap=gap, part=part)]
    covered = {byte for offset, nbytes in requests for byte in range(offset, offset + nbytes)}
    needed = {byte for offset, nbytes in wanted for byte in range(offset, offset + nbytes)}
    assert needed <= covered
    assert all(nbytes <= part for _, nbytes in requests)
    assert sum(nbytes for _, nbytes in requests) == len(covered)
    assert len(covered - needed) <= gap * len(wanted)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_held_is_asked_for_once_and_every_byte_is_right(seed: int) -> None:
    rng = random.Random(seed)
    store = Held({"a": DATA})
    ranged = Ranged(store, "a", Info(len(DATA), "tag"))
    held = ranged.hold([(0, 1 << 20), (2 << 20, 1 << 19)])
    for _ in range(30):
        begin = rng.choice([0, 2 << 20]) + rng.randrange(1 << 18)
        sizes = [rng.randrange(1, 90_000) for _ in range(rng.randrange(1, 4))]
        views = [memoryview(bytearray(size)) for size in sizes]
        ranged.fill(begin, list(views), sum(sizes))
        assert b"".join(views) == DATA[begin : begin + sum(sizes)]
    assert len(store.asked) == 2
    ranged.drop(held)
    across = memoryview(bytearray(300_000))
    ranged.fill(900_000, [across], 300_000)
    assert across == DATA[900_000:1_200_000]
    assert len(store.asked) == 3


def test_a_heading_is_checked_when_its_payload_is_read() -> None:
    seen: list[bytes] = []
    ranged = Ranged(Held({"a": DATA}), "a", Info(len(DATA), "tag"))
    for offset in (1000, 5000):
        ranged.expect(Heading(offset, 10, seen.append))
    ranged.fill(1010, [memoryview(bytearray(50))], 50)
    ranged.fill(1500, [memoryview(bytearray(50))], 50)
    assert seen == [DATA[1000:1010]]
    ranged.fill(5500, [memoryview(bytearray(50))], 50)
    assert seen[1:] == [DATA[5000:5010]]


def test_a_request_is_tried_again_and_then_there_is_one_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE", 0.0)
    info = Info(len(DATA), "tag")
    some = [TransientError("status 503"), TransientError("status 429")]
    assert fetch(Held({"a": DATA}, some), "a", 5, 10, info) == DATA[5:15]
    store = Held({"a": DATA}, [TransientError("status 503")] * 100)
    with pytest.raises(StoreError) as caught:
        fetch(store, "a", 5, 10, info)
    assert len(store.asked) == fetching.TRIES
    assert ("answer", "status 503") in caught.value.facts
    with pytest.raises(SourceChangedError, match="s3://bucket/a"):
        fetch(Held({"a": DATA}, [ChangedError()]), "a", 5, 10, info)


def test_what_may_be_a_credential_is_left_out() -> None:
    text = "GET https://me:hush@host/a?sig=hush&x=1 failed for s3://bucket/key"
    assert without_secrets(text) == "GET https://host/a failed for s3://bucket/key"
