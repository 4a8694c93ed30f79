"""DeepSpeed's files as version 0.19.8 lays them out, written without DeepSpeed.

Source: deepspeed 0.19.8 ``runtime/zero/stage_1_and_2.py`` (``__init__``: alignment to two elements
per rank; ``state_dict``: the weights without that padding, the moments with it),
``runtime/zero/stage3.py`` (``_rigid_state_dict``), ``runtime/engine.py``
(``_common_checkpoint_state``, ``_get_zero_ckpt_name``).
"""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run to be written.

    Attributes:
        groups: fp32 weights by parameter group, in the optimizer's order.
        frozen: Parameters outside the optimizer.
        buffers: What is no parameter.
        tied: Second name -> first name.
        moments: Name (``exp_avg``) -> tensors of the weights' shapes.
        ranks: Processes.
        stage: Of ZeRO.
        step: Updates so far.
        count: The optimizer's ``step`` as it stores it; by default a tensor.
    """

    groups: Sequence[State]
    ranks: int
    stage: int
    frozen: State = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    moments: Mapping[str, State] = field(default_factory=dict)
    step: int = 4
    count: object = None

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {key: value for group in self.groups for key, value in group.items()}


@contextmanager
def names_of_deepspeed() -> Iterator[tuple[Any, Any]]:
    """The enum of stages and the loss scaler that the pickles name, for as long as it takes."""
    homes = ("deepspeed.runtime.zero.config", "deepspeed.runtime.fp16.loss_scaler")
    parents = {".".join(home.split(".")[:n]) for home in homes for n in range(1, 5)}
    before = {name: sys.modules.get(name) for name in parents}
    sys.modules.update({name: types.ModuleType(name) for name in parents})
    try:
        stage = enum.IntEnum(  # type: ignore[misc]
            "ZeroStageEnum", {"optimizer_states": 1, "gradients": 2, "weights": 3}, module=homes[0]
        )
        scaler = type("LossScaler", (), {"__module__": homes[1]})
        sys.modules[homes[0]].ZeroStageEnum = stage  # type: ignore[attr-defined]
        sys.modules[homes[1]].LossScaler = scaler  # type: ignore[attr-defined]
        yield stage, scaler
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def write_zero(root: Path, run: Run) -> Path:
    """``save_checkpoint(root)``; returns the directory of the step."""
    at = root / f"global_step{run.step}"
    at.mkdir(parents=True)
    (root / "latest").write_text(at.name)
    for rank in range(run.ranks if run.stage == 3 else 1):
        prefix = f"zero_pp_rank_{rank}_" if run.stage == 3 else ""
        torch.save(_model_states(run, rank), at / f"{prefix}mp_rank_00_model_states.pt")
    with names_of_deepspeed() as (stage, scaler):
        for rank in range(run.ranks):
            states = {
                "optimizer_state_dict": _optim_states(run, rank)
                | {"zero_stage": stage(run.stage), "loss_scaler": scaler()},
                "ds_config": {"zero_optimization": {"stage": run.stage}},
                "ds_version": "0.19.8",
            }
            torch.save(states, at / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return at


def _model_states(run: Run, rank: int) -> dict[str, Any]:
    half = {key: value.bfloat16() for key, value in run.weights.items()}
    half |= dict(run.frozen) | {key: half[owner] for key, owner in run.tied.items()}
    if run.stage == 3:
        half = {key: torch.empty(0, dtype=torch.bfloat16) for key in half}
    return {
        "module": OrderedDict(half | dict(run.buffers)),
        "buffer_names": [*run.buffers],
        "param_shapes": [OrderedDict((k, v.shape) for k, v in g.items()) for g in run.groups],
        "frozen_param_shapes": OrderedDict((k, v.shape) for k, v in run.frozen.items()),
        "frozen_param_fragments": OrderedDict(
            (k, _cut(v, run.ranks, rank) if run.stage == 3 else v) for k, v in run.frozen.items()
        ),
        "shared_params": dict(run.tied),
        "global_steps": run.step,
        "dp_world_size": run.ranks,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": run.stage}},
        "ds_version": "0.19.8",
    }


def _optim_states(run: Run, rank: int) -> dict[str, Any]:
    count = torch.tensor(float(run.step)) if run.count is None else run.count
    inner = {
        "state": {
            n: {"step": count} | {name: _share(run, rank, g, m) for name, m in run.moments.items()}
            for n, g in enumerate(run.groups)
        },
        "param_groups": [
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1 / (n + 1)}
            | {"params": [n]}
            for n, _ in enumerate(run.groups)
        ],
    }
    flat = [_share(run, rank, group, group) for group in run.groups]
    if run.stage == 3:
        return {
            "partition_count": run.ranks,
            "optimizer_state_dict": inner,
            "fp32_flat_groups": flat,
        }
    paddings = [
        max(0, min(len(f), (rank + 1) * len(f) - sum(v.numel() for v in g.values())))
        for g, f in zip(run.groups, flat, strict=True)
    ]
    return {
        "base_optimizer_state": inner,
        "single_partition_of_fp32_groups": [
            f[: len(f) - padding].clone() for f, padding in zip(flat, paddings, strict=True)
        ],
        "group_paddings": paddings,
        "partition_count": [run.ranks] * len(run.groups),
    }


def _share(run: Run, rank: int, group: State, values: State) -> torch.Tensor:
    """A rank's vector of a group: the cuts of all parameters, or a slice of all of them."""
    if run.stage == 3:
        return torch.cat([_cut(values[key], run.ranks, rank) for key in group])
    flat = torch.cat([values[key].flatten() for key in group])
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % (2 * run.ranks))])
    return padded.chunk(run.ranks)[rank].clone()


def _cut(value: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    flat = value.flatten()
    return torch.cat([flat, flat.new_zeros(-len(flat) % ranks)]).chunk(ranks)[rank].clone()
