"""What tests of stores share: a bucket of moto's server, and a model to put into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf
from support.machine.s3_server import Bucket, serving_s3

VOCAB = 4_000
SHAPES = {k: (VOCAB, s[1]) if s[0] == 131 else s for k, s in llama_shapes().items()}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setattr("dcpconv.stores.fetching._FIRST_PAUSE", 0.001)
    with serving_s3(monkeypatch) as bucket:
        yield bucket


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: torch.randn(shape).bfloat16() for key, shape in SHAPES.items()}


@pytest.fixture
def model(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    source = write_hf(tmp_path / "model", {}, config={**CONFIG, "vocab_size": VOCAB})
    save_file(tensors, source / "model.safetensors")
    return source
