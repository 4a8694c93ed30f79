"""Carries a training run, optimizer and all, between the checkpoints of different trainers."""

from __future__ import annotations

from dcpconv.runs.carrying.carrying import convert_run
from dcpconv.runs.carrying.reading import read_training_state
from dcpconv.runs.carrying.report import CarryReport
from dcpconv.runs.carrying.state import Group, Kind, OptimizerError, TrainingState

__all__ = [
    "CarryReport",
    "Group",
    "Kind",
    "OptimizerError",
    "TrainingState",
    "convert_run",
    "read_training_state",
]
