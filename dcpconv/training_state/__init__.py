"""Carries a training run, optimizer and all, between the checkpoints of different trainers."""

from __future__ import annotations

from dcpconv.training_state.carrying import convert_run
from dcpconv.training_state.reading import read_training_state
from dcpconv.training_state.report import CarryReport
from dcpconv.training_state.state import Group, Kind, OptimizerError, TrainingState

__all__ = [
    "CarryReport",
    "Group",
    "Kind",
    "OptimizerError",
    "TrainingState",
    "convert_run",
    "read_training_state",
]
