"""dcpconv: model weights between the forms they are published in and trained in.

    from dcpconv import convert, load_init_weights, open_checkpoint

Nothing here imports torch until a dtype changes or a live model is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcpconv.checking.check import check
    from dcpconv.comparing.diff import diff
    from dcpconv.comparing.fingerprint import fingerprint
    from dcpconv.comparing.records import Diff
    from dcpconv.conversion.convert import convert
    from dcpconv.conversion.drop_in import dcp_to_torch_save, torch_save_to_dcp
    from dcpconv.conversion.saving.save_weights import save_weights
    from dcpconv.conversion.saving.storage_writer import CheckpointWriter
    from dcpconv.core.errors import DcpconvError
    from dcpconv.formats.opening import open_checkpoint
    from dcpconv.loading.init_weights import LoadReport, load_init_weights
    from dcpconv.loading.storage_reader import CheckpointReader
    from dcpconv.loading.training_state import load_training_state
    from dcpconv.plan.coverage import Coverage
    from dcpconv.plan.fingerprints import Fingerprint
    from dcpconv.runs import find_checkpoints, find_latest_checkpoint, resolve_checkpoint

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "Coverage",
    "DcpconvError",
    "Diff",
    "Fingerprint",
    "LoadReport",
    "check",
    "convert",
    "dcp_to_torch_save",
    "diff",
    "find_checkpoints",
    "find_latest_checkpoint",
    "fingerprint",
    "load_init_weights",
    "load_training_state",
    "open_checkpoint",
    "resolve_checkpoint",
    "save_weights",
    "torch_save_to_dcp",
]

_HOMES = {
    "CheckpointReader": "dcpconv.loading.storage_reader",
    "CheckpointWriter": "dcpconv.conversion.saving.storage_writer",
    "Coverage": "dcpconv.plan.coverage",
    "DcpconvError": "dcpconv.core.errors",
    "Diff": "dcpconv.comparing.records",
    "Fingerprint": "dcpconv.plan.fingerprints",
    "LoadReport": "dcpconv.loading.init_weights",
    "check": "dcpconv.checking.check",
    "convert": "dcpconv.conversion.convert",
    "dcp_to_torch_save": "dcpconv.conversion.drop_in",
    "diff": "dcpconv.comparing.diff",
    "find_checkpoints": "dcpconv.runs",
    "find_latest_checkpoint": "dcpconv.runs",
    "fingerprint": "dcpconv.comparing.fingerprint",
    "load_init_weights": "dcpconv.loading.init_weights",
    "load_training_state": "dcpconv.loading.training_state",
    "open_checkpoint": "dcpconv.formats.opening",
    "resolve_checkpoint": "dcpconv.runs",
    "save_weights": "dcpconv.conversion.saving.save_weights",
    "torch_save_to_dcp": "dcpconv.conversion.drop_in",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dcpconv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
