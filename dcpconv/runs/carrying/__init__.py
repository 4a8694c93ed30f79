"""Carries a training run, optimizer and all, between the checkpoints of different trainers."""

from __future__ import annotations

from dcpconv.plan.training.reading import read_training_state
from dcpconv.plan.training.state import Group, Kind, OptimizerError, TrainingState
from dcpconv.runs.carrying.carrying import convert_run
from dcpconv.runs.carrying.report import CarryReport

__all__ = [
    "CarryReport",
    "Group",
    "Kind",
    "OptimizerError",
    "TrainingState",
    "convert_run",
    "read_training_state",
]
