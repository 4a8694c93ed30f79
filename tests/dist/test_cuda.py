"""Weights into and out of a real GPU: pinned tiles, streams, and a group that is NCCL alone.

Every world of ``test_init_weights``, ``test_saving`` and ``test_training_state`` runs on a GPU as
well: ``DCPCONV_TEST_DEVICE=cuda pytest tests/dist/test_init_weights.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.worlds import cuda_scenes
from support.worlds.dist_worlds import Outcome, launch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

World = dict[str, Outcome]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("cuda")
    cuda_scenes.prepare(directory)
    return launch(cuda_scenes.__file__, 1, directory, device="cuda")[0]


def value(world: World, scene: str) -> Any:
    assert not world[scene].error, world[scene].text
    return world[scene].value


@pytest.mark.parametrize("how", ["plain", "fsdp2", "torch"])
def test_a_model_without_memory_is_filled_on_the_gpu(world: World, how: str) -> None:
    assert value(world, f"loads/{how}") == 30


@pytest.mark.parametrize("how", ["fp32", "fp32-threads", "bf16"])
def test_the_gpu_holds_the_shard_and_nothing_beside_it(world: World, how: str) -> None:
    assert value(world, f"fills/{how}") <= 32 * cuda_scenes.MIB


def test_a_kernel_that_reads_the_old_weights_ends_first(world: World) -> None:
    assert value(world, "busy") is True


def test_tiles_are_pinned_and_copied_beside_what_computes(world: World) -> None:
    assert value(world, "pins") == [True, True, True]


def test_dcp_load_reads_into_gpu_tensors(world: World) -> None:
    assert value(world, "reads") is True


def test_saved_bytes_are_those_of_the_cpu(world: World) -> None:
    assert value(world, "saves") is True
