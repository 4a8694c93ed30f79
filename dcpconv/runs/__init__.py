"""The checkpoints of a training run: find them, choose one, check them, keep some."""

from __future__ import annotations

from dcpconv.runs.errors import RunError, WantedError
from dcpconv.runs.finding import FoundStep, find_checkpoints
from dcpconv.runs.layouts import Layout
from dcpconv.runs.pruning import Pruning, prune
from dcpconv.runs.resolving import find_latest_checkpoint, resolve_checkpoint
from dcpconv.runs.retention import Best, Decision, Retention
from dcpconv.runs.stripping import Stripping, strip
from dcpconv.runs.verifying import StepCheck, verify_checkpoints

__all__ = [
    "Best",
    "Decision",
    "FoundStep",
    "Layout",
    "Pruning",
    "Retention",
    "RunError",
    "StepCheck",
    "Stripping",
    "WantedError",
    "find_checkpoints",
    "find_latest_checkpoint",
    "prune",
    "resolve_checkpoint",
    "strip",
    "verify_checkpoints",
]
