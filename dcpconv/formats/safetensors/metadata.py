"""What ``__metadata__`` of a safetensors file says beyond the tensors, in any form.

torchao keeps there how its tensors are packed.  Forms without such a place have it in a file
beside the weights.

Source:
    torchao 0.18 ``prototype/safetensors/safetensors_support.py``: an entry per tensor, and
    ``tensor_names``, a list of all.  transformers 5.23 joins the entries of all files of a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SIDE_FILE: Final = "safetensors_metadata.json"
"""Where forms without ``__metadata__`` keep its entries."""

_OF_STORAGE: Final = frozenset({"DCP_SHARDING_INFO", "DCP_VERSION"})
"""Entries that say how slices lie in files; the result lays them out anew."""
_LARGEST: Final = 100_000_000
"""Bytes; a header is no larger."""


def united(said: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The entries of all files of a checkpoint, without what every file says anyway.

    Lists and objects in JSON are united.  Where files contradict each other, what the first says
    is kept, and the note names the others.

    Args:
        said: Entries of each file, by its name.

    >>> united({"a": {"format": "pt", "names": '["x"]'}, "b": {"names": '["y", "x"]'}})
    ({'names': '["x", "y"]'}, ())
    """
    entries: dict[str, str] = {}
    first: dict[str, str] = {}
    notes: dict[str, None] = {}
    for file, some in said.items():
        for name, value in some.items():
            if name in _OF_STORAGE or (name, value) == ("format", "pt"):
                continue
            joined = value if name not in entries else _joined(entries[name], value)
            if joined is None:
                text = f"__metadata__ of {first[name]} and {file} differ in {name}"
                notes[f"{text}; what {first[name]} says is kept"] = None
                continue
            entries[name] = joined
            first.setdefault(name, file)
    return entries, tuple(notes)


def _joined(one: str, other: str) -> str | None:
    """Two values of one entry as one, or ``None`` if they contradict each other."""
    if one == other:
        return one
    try:
        left, right = json.loads(one), json.loads(other)
    except (ValueError, RecursionError):
        return None
    if isinstance(left, list) and isinstance(right, list):
        return json.dumps([*left, *(item for item in right if item not in left)])
    if isinstance(left, dict) and isinstance(right, dict):
        is_same = all(left[name] == right[name] for name in left.keys() & right.keys())
        return json.dumps({**left, **right}) if is_same else None
    return None


def to_side_file(entries: Mapping[str, str]) -> str:
    """The text of the file beside the weights."""
    return json.dumps(dict(entries), indent=2, ensure_ascii=False) + "\n"


def from_side_file(directory: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """The entries beside the weights in a directory, and what to say about them."""
    file = directory / SIDE_FILE
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return {}, ()
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}, (f"{SIDE_FILE} cannot be read and was not used",)
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        return {}, (f"{SIDE_FILE} holds something else than strings and was not used",)
    return entries, ()
