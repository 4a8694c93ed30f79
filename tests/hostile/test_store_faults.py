"""Whatever happens between us and a bucket: a result is whole or absent, and no byte is wrong.

Faults are injected by a proxy, 60 in an ordinary run and any number with ``--faults N``.  The seed
of a round is in the message of a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dcpconv import convert
from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.formats.opening import open_checkpoint
from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf
from support.machine.fault_proxy import at_random, spoiling
from support.machine.s3_server import Bucket, point_to, serving_s3

MIB = 1 << 20
VOCAB = 40_000
"""Rows of the embeddings: results of 15 MB, which are sent in three parts."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that is asked for little at a time, and asked again at once."""
    monkeypatch.setattr("dcpconv.stores.ahead.WINDOW", MIB)
    monkeypatch.setattr("dcpconv.stores.fetching._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("dcpconv.engine.uploading.PART", 5 * MIB)
    with serving_s3(monkeypatch) as bucket:
        from datetime import timedelta

        from dcpconv.stores import buckets

        quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(seconds=0.01)}
        monkeypatch.setitem(buckets.PATIENCE, "backoff", {**quick, "base": 2})
        yield bucket


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shapes = {k: (VOCAB, s[1]) if s[0] == 131 else s for k, s in llama_shapes().items()}
    source = write_hf(tmp_path / "model", {}, config={**CONFIG, "vocab_size": VOCAB})
    torch.manual_seed(0)
    tensors = {key: torch.randn(shape).bfloat16() for key, shape in shapes.items()}
    save_file(tensors, source / "model.safetensors")
    return source


TARGETS: dict[str, dict[str, Any]] = {
    "dcp": {"to": "lingua", "chunks": 2},
    "hf": {"form": "hf", "max_file_size": 6 * MIB},
    "one": {"form": "hf"},
    "out.pth": {"to": "lingua"},
}


def _files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.timeout(0)
def test_a_result_is_whole_or_absent_whatever_the_network_does(
    bucket: Bucket,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: int,
) -> None:
    bucket.upload(model, "model")
    expected = {}
    for name, options in TARGETS.items():
        convert(model, tmp_path / "expected" / name, **options)
        expected[name] = _files(tmp_path / "expected" / name)
    injected = ended = seed = 0
    while injected < faults:
        name = sorted(TARGETS)[seed % len(TARGETS)]
        source: str | Path = model if seed % 3 == 0 else "s3://tests/model"
        is_remote = seed % 3 != 1
        key = f"out-{seed}/{name}"
        target: str | Path = f"s3://tests/{key}" if is_remote else tmp_path / key
        with spoiling(bucket.url, at_random(seed, (0.05, 0.2, 0.6)[seed % 5 % 3])) as proxy:
            point_to(proxy.url, monkeypatch)
            told = None
            try:
                convert(source, target, **TARGETS[name])
            except DcpconvError as error:
                told = str(error)
            else:
                ended += 1
        point_to(bucket.url, monkeypatch)
        injected += proxy.faults
        if told is not None:
            assert "secret-of-the-tests" not in told, f"seed {seed}"
            with pytest.raises(NotACheckpointError):
                open_checkpoint(target)
            convert(source, target, **TARGETS[name])  # nothing is in the way of another try
        found = bucket.contents(key) if is_remote else _files(tmp_path / key)
        _assert_same(found, expected[name], f"seed {seed}, {name}")
        seed += 1
    assert ended


def _assert_same(found: dict[str, bytes], expected: dict[str, bytes], where: str) -> None:
    """The same files; data of a second try may have other names, which the index then has too."""
    if found.keys() == expected.keys():
        assert found == expected, where
        return
    weights = (".safetensors", ".distcp")
    data = [sorted(v for k, v in one.items() if k.endswith(weights)) for one in (found, expected)]
    assert data[0] == data[1], where
    rest = [{k for k in one if not k.endswith(weights)} for one in (found, expected)]
    assert {name for name in rest[0] if "unfinished" not in name} == rest[1], where
