"""Does an adapter fit its base?  Every pair needs its matrix and shape; headers alone are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.plan.adapting import merge_of
from dcpconv.plan.coverage import Coverage, Piece, Target, as_stored
from dcpconv.sources.adapters.naming import Weighed
from dcpconv.sources.adapters.reading import open_adapter, read_adapter
from dcpconv.sources.adapters.spotting import MINIMIND, WEIGHTS, is_adapter
from dcpconv.sources.fitting import bare
from dcpconv.sources.opening import End, Openable
from dcpconv.sources.parameter_shapes import expected
from dcpconv.sources.recognition import Weights
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import Source, understand_described
from dcpconv.stores.schemes import path_of

_TORCH_FILES = frozenset({".pth", ".pt", ".bin"})


def adapter_path(source: Openable) -> Path | None:
    """The PEFT directory or the file of MiniMind's LoRA that the user named, or ``None``.

    Raises:
        HubError: A repository was named that is not there, or cannot be reached.
    """
    if not isinstance(source, str | os.PathLike):
        return None
    path = path_of(source)
    directory = path.parent if path.name in WEIGHTS else path
    if is_adapter(directory):
        return directory
    return path if _is_lora_file(path) else None


def _is_lora_file(path: Path) -> bool:
    """Whether a file that is called after LoRA holds nothing else, as MiniMind's trainer saves it.

    A file of another name is not looked into, since every check would read it twice.
    """
    if "lora" not in path.name or path.suffix not in _TORCH_FILES or not path.is_file():
        return False
    keys = open_adapter(path).tensors
    return bool(keys) and all(MINIMIND.fullmatch(bare(key)) for key in keys)


def check_adapter(
    path: Path,
    against: Openable | None,
    said: Said,
) -> Coverage:
    """The account of every factor against the base that it shall be merged into.

    Args:
        path: The adapter.
        against: The base: a checkpoint, a ``config.json``, a key list, a live model; without one
            only the adapter itself is checked.
        said: What the user says of the base.

    Raises:
        NotExpressibleError: The adapter is of a kind that cannot be merged.
        FormatError: The adapter is not whole, or a file is malformed.
    """
    adapter = read_adapter(path)
    catalog = adapter.catalog
    end = End(str(path), "adapter", len(catalog.tensors), len(catalog.files))
    if against is None:
        targets = tuple(as_stored(key, entry) for key, entry in catalog.tensors.items())
        note = "every factor has its counterpart; --against BASE also says whether it fits its base"
        return Coverage(adapter.kind, adapter.kind, targets, read=end, notes=(*adapter.notes, note))
    base = understand_described(against, said)
    weights = _weights(base)
    merged = merge_of(
        weights,
        [Weighed(adapter)],
        spec=base.spec,
        architecture=base.architecture,
        dequantize=True,
    )
    stored = {entry.key: entry for entry in weights.entries.values()}
    return Coverage(
        source=adapter.kind,
        target=weights.keymap.name if weights.keymap else "as stored",
        targets=tuple(_targets(merged.found, stored)),
        missing=tuple(merged.missing),
        misshapen=tuple(merged.misshapen),
        read=end,
        asked=base.end,
        notes=(*adapter.notes, *base.notes, *merged.notes),
    )


def _targets(
    found: list[tuple[str, tuple[str, ...]]], stored: Mapping[str, TensorEntry]
) -> list[Target]:
    made = []
    for key, names in found:
        entries = [stored[name] for name in names if name in stored]
        if entries:
            pieces = tuple(map(Piece, entries))
            made.append(Target(key, entries[0].shape, entries[0].dtype, pieces))
    return made


def _weights(base: Source) -> Weights:
    """The base's weights, or those that its parameter file describes."""
    table, spec = base.keymap, base.spec
    if base.end.form != "config" or table is None or spec is None:
        return base.weights
    dtype = BY_NAME["float32"]  # nothing looks at it
    entries = {
        key: TensorEntry(key, dtype, shape, ())
        for key, shape, _ in expected(table, spec)
        if shape is not None
    }
    catalog = replace(base.catalog, tensors=entries)
    return Weights(catalog, entries, {}, table, "", ())
