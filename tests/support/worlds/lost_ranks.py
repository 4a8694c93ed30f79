"""Pairs of ranks, each a process group of its own, of which the second is lost while loading.

Run as a script by ``run_ranks``; the survivor of every pair writes down what it heard.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict

from dcpconv.loading import agreement, moving
from dcpconv.loading.exchange import Exchange
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader
from dcpconv.loading.training_state import load_training_state
from support.versions import save_alone

TIMEOUT_S = 30
"""Of the pairs' groups; a survivor that waited for longer would not end with the test."""


def _dies(*_args: Any, **_options: Any) -> NoReturn:
    os._exit(0)


def _hangs(*_args: Any, **_options: Any) -> NoReturn:
    time.sleep(2 * TIMEOUT_S)
    os._exit(0)


def _replace(owner: Any, name: str, way: Callable[..., Any]) -> Callable[[], None]:
    return lambda: setattr(owner, name, way)


ADAPTER = "adapter"
"""Named as one of the options: where it lies is known to the ranks alone."""

PAIRS: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
    "deciding": (_replace(agreement, "_look_at_source", _dies), {}),
    "reading": (_replace(moving, "_read", _dies), {"read": "all"}),
    "sending": (_replace(Exchange, "_read", _dies), {"read": "once"}),
    "stock": (_replace(CheckpointReader, "read_data", _dies), {"engine": "torch"}),
    "hanging": (_replace(moving, "_read", _hangs), {"read": "all"}),
    "adapting": (_replace(agreement, "_look_at_adapter", _dies), {ADAPTER: "adapter"}),
    "hanging-sending": (_replace(Exchange, "_read", _hangs), {"read": "once"}),
    "training": (_replace(moving, "_send", _dies), {"read": "once"}),
}
"""How the second of a pair is lost, and how the pair loads."""


SOURCES = {name: "run" if name == "training" else "weights.pt" for name in PAIRS}
"""What each pair loads."""


def prepare(directory: Path) -> None:
    """Weights, an adapter for them, and a run that goes on from them."""
    from safetensors.torch import save_file

    model = model_of_two_tiles()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(model.state_dict(), directory / "weights.pt")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    save_alone({"model": weights, "optim": moments}, checkpoint_id=directory / "run")
    pair = {"lora_A": torch.ones(2, 1300), "lora_B": torch.ones(1300, 2)}
    adapter = directory / "adapter"
    adapter.mkdir()
    tensors = {f"base_model.model.0.{name}.weight": tensor for name, tensor in pair.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def model_of_two_tiles() -> torch.nn.Module:
    """Each of two ranks reads a part of it with ``read="once"``."""
    return torch.nn.Sequential(torch.nn.Linear(1300, 1300), torch.nn.Linear(1300, 7))


def main() -> None:
    rank, ranks, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    span = timedelta(seconds=TIMEOUT_S)
    groups = [dist.new_group([n, n + 1], timeout=span) for n in range(0, ranks, 2)]
    name, (lose, options) = list(PAIRS.items())[rank // 2]
    if rank % 2:
        lose()
    model = model_of_two_tiles()
    found = {"error": "", "text": ""}
    if ADAPTER in options:
        options = {ADAPTER: directory / options[ADAPTER]}
    group = groups[rank // 2]
    try:
        if name == "training":
            optimizer = torch.optim.AdamW(model.parameters())
            source = directory / SOURCES[name]
            load_training_state(model, optimizer, source, process_group=group, **options)
        else:
            load_init_weights(model, directory / "weights.pt", process_group=group, **options)
    except Exception as error:  # noqa: BLE001 - its class is what the test looks at
        found = {"error": type(error).__name__, "text": str(error)}
    (directory / f"{name}.json").write_text(json.dumps(found))
    os._exit(0)  # the default group cannot be taken down: half of it is gone


if __name__ == "__main__":
    main()
