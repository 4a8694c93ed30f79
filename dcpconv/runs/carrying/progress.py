"""How far a run is, in the words of another trainer: epochs, steps, schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dcpconv.core.errors import DcpconvError
from dcpconv.plan.training.state import Group, TrainingState, read_scalar

Beside = dict[str, object]


def rescaled(
    beside: Mapping[str, object], world_size: int | None
) -> tuple[Beside, tuple[str, ...]]:
    """MiniMind's ``step`` for another number of ranks, and what to say about it.

    A step is a batch per rank, so on twice the ranks half as many steps see the same samples.

    Args:
        beside: With ``step`` and ``world_size``, where the source is MiniMind's.
        world_size: Ranks that will go on; ``None`` leaves the step to whoever loads it.

    Source: jingyaogong/minimind@d65ef2c ``trainer/trainer_utils.py``, ``lm_checkpoint``.
    """
    step, saved = beside.get("step"), beside.get("world_size", 1)
    if not isinstance(step, int) or not isinstance(saved, int) or "epoch" not in beside:
        note = "world_size was not applied: the source counts no steps of an epoch"
        return dict(beside), (note,) if world_size is not None else ()
    if world_size is None or world_size == saved:
        note = f"step {step} counts batches of {saved} ranks; it was left as it is"
        return dict(beside), (note,) if world_size is None else ()
    if world_size < 1:
        raise DcpconvError("a run has at least one rank", [("world_size", world_size)])
    new = step * saved // world_size
    note = f"step {step} of {saved} ranks became step {new} of {world_size} ranks"
    return {**beside, "step": new, "world_size": world_size}, (note,)


def optimizer_step(state: TrainingState) -> int:
    """Updates that the optimizer made: the largest ``step`` of its parameters; 0 without any."""
    counts = [moments["step"] for moments in state.moments.values() if "step" in moments]
    values = [
        value
        for count in counts[:64]
        if (value := count if isinstance(count, float) else read_scalar(state.root, count))
    ]
    return int(max(values, default=0))


def trainer_state(state: TrainingState) -> Beside:
    """A ``trainer_state.json`` for a run that another trainer began.

    Source: transformers 5.23 ``trainer_callback.py``, ``TrainerState``.
    """
    epoch = state.beside.get("epoch")
    return {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": float(epoch) if isinstance(epoch, int) else 0.0,
        "eval_steps": 500,
        "global_step": optimizer_step(state),
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": [],
        "logging_steps": 500,
        "max_steps": 0,
        "num_input_tokens_seen": 0,
        "num_train_epochs": 0,
        "save_steps": 500,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": None,
        "trial_name": None,
        "trial_params": None,
    }


def scheduler(groups: Sequence[Group], step: int) -> Beside:
    """The state of a ``LambdaLR`` after ``step`` updates, for a run that had no scheduler.

    Source: torch 2.13 ``torch/optim/lr_scheduler.py``.
    """
    rates = [group.values.get("lr", 0.0) for group in groups]
    return {
        "base_lrs": [
            group.values.get("initial_lr", group.values.get("lr", 0.0)) for group in groups
        ],
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": rates,
        "lr_lambdas": [None] * len(groups),
    }


def minimind_progress(state: TrainingState) -> tuple[Beside, tuple[str, ...]]:
    """MiniMind's ``epoch`` and 1-based ``step`` in it, from what the source counts."""
    if "epoch" in state.beside and "step" in state.beside:
        return {}, ()
    counted: Any = state.beside.get("trainer_state")
    counted = counted if isinstance(counted, Mapping) else {}
    updates, epoch = counted.get("global_step"), counted.get("epoch")
    if not isinstance(updates, int):
        updates = optimizer_step(state)
    if isinstance(epoch, (int, float)) and epoch > 0:
        whole = int(epoch)
        step = round((epoch - whole) * updates / epoch)
    else:
        whole, step = 0, updates
    note = f"epoch {whole} and step {step} follow from {updates} updates; one batch each is assumed"
    return {"epoch": whole, "step": step, "world_size": 1}, (note,)
