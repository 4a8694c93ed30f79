"""Which files beside the weights a model needs: an open list, whoever made the directory.

Everything goes along that is not weights, not an index, not a cache and not the state of a run:
processors, remote code, chat templates, the files of sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.gguf"),
    *("*.onnx", "*.onnx_data", "*.tflite", "*.distcp", "*.npz", "*.nemo", "*.mlmodel", "*.ot"),
)
_INDEXES = (
    *("*.index.json", ".metadata", "metadata.pkl", "dcpconv_keys*.json"),
    *("dcpconv_fingerprint*.json", "*.dcpconv_fingerprint.json"),
    "safetensors_metadata.json",
)
_CACHES = (".*", "__pycache__", "*.lock", "*.tmp", "*.incomplete", "*.pyc", "runs", "wandb")
_RUNS = (
    *("trainer_state.json", "train_state_*.json", "latest", "latest_checkpointed_iteration.txt"),
    *("zero_to_fp32.py", "events.out.tfevents.*", "metrics.jsonl", "*.log", "global_step*"),
    *("checkpoint-*", "fsdp_config.json", "wandb", "all_results.json", "train_results.json"),
    *("eval_results.json", "adapter_config.json"),
)
"""What a trainer leaves behind that says nothing of the model."""

_LARGEST = 100 << 20
"""Bytes; no tokenizer is larger, and weights under an odd name should not slip through."""

_MODULES = "modules.json"
"""Source: sentence-transformers lists the folders of its modules here; their weights are theirs."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside the weights.

    Attributes:
        files: Name relative to the directory, with ``/`` between its parts -> where it lies.
        notes: What is left, one sentence each.
    """

    files: dict[str, Path]
    notes: tuple[str, ...] = ()


def weights_beside(directory: Path, used: Collection[str]) -> tuple[str, ...]:
    """What to say where a second set of weights, or what a trainer keeps, lies beside the first.

    Args:
        directory: Where the weights are.
        used: Names of the files that they were read from.
    """
    others = [
        path.name
        for path in sorted(directory.iterdir())
        if path.name not in used
        and path.is_file()
        and _is_any(path.name, _WEIGHTS)
        and not _is_any(path.name, (*_CACHES, "adapter_model.*"))
    ]
    if not used or not others:
        return ()
    return (f"the weights were read from {_few(sorted(used))}; beside them lie {_few(others)}",)


def files_beside(directory: Path) -> Beside:
    """What goes along with the weights of a directory.

    Args:
        directory: Where the source, or ``--assets``, keeps them.
    """
    if not directory.is_dir():
        return Beside({})
    found: dict[str, Path] = {}
    large: list[str] = []
    modules = _module_folders(directory)
    for path in sorted(directory.iterdir()):
        name = path.name
        if _is_any(name, (*_CACHES, *_RUNS)):
            continue
        if path.is_dir():
            inside = list(_inside(path, name))
            if name in modules or not any(_is_any(n, _WEIGHTS) for n, _ in inside):
                found.update(inside)
        elif not path.is_file() or _is_any(name, (*_INDEXES, *_WEIGHTS)):
            continue
        elif path.stat().st_size > _LARGEST:
            large.append(name)
        else:
            found[name] = path
    notes = (f"left behind, for its size: {', '.join(large)}",) if large else ()
    return Beside(found, notes)


def _inside(directory: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Files of a folder, two levels deep: no model hides what it needs further down."""
    for path in sorted(directory.iterdir()):
        if _is_any(path.name, _CACHES):
            continue
        if path.is_file() and path.stat().st_size <= _LARGEST:
            yield f"{name}/{path.name}", path
        elif path.is_dir() and "/" not in name:
            yield from _inside(path, f"{name}/{path.name}")


def _module_folders(directory: Path) -> frozenset[str]:
    file = directory / _MODULES
    try:
        listed = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        return frozenset(str(module["path"]) for module in listed)
    except (ValueError, TypeError, KeyError, RecursionError):
        return frozenset()


def _is_any(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
