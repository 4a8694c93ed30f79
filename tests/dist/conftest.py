"""Process groups start once for all tests that look at what they saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpconv import convert
from dcpconv.core.catalog import KeyPath
from support.checkpoints.dcp_directories import write
from support.models.hf_models import save_hf, tiny
from support.worlds import rank_file_worlds, wild_worlds
from support.worlds.dcp_worlds import launch, weights


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two-ranks")
    tensors: dict[KeyPath, torch.Tensor] = {
        ("model", key): tensor for key, tensor in weights().items()
    }
    write(directory / "ours", tensors)
    write(directory / "ours-chunked", tensors, {("step",): 3}, chunks=3)
    launch(2, directory)
    return directory


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("four-ranks")
    launch(4, directory)
    return directory


@pytest.fixture(scope="session")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wild")
    hf = save_hf(tiny("llama"), directory / "lingua/hf")
    convert(hf, directory / "lingua/init", to="lingua")
    launch(2, directory, script=wild_worlds.__file__)
    return directory


@pytest.fixture(scope="session")
def rank_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rank-files")
    launch(rank_file_worlds.RANKS, directory, script=rank_file_worlds.__file__)
    return directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of several processes share them, and the first one waits for them to start."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))
