"""Keys, shapes and element types without a checkpoint: a file that a team commits, a live model.

A key list is JSON with one tensor per line, so that a change of the model is a readable diff::

    {
      "dcpconv_keys": 1,
      "family": "lingua",
      "tied": {},
      "tensors": {
        "tok_embeddings.weight": {"dtype": "bf16", "shape": [131, 96]}
      }
    }
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_NAME, dtype_named
from dcpconv.core.errors import FormatError
from dcpconv.sources.recognition import Weights
from dcpconv.stores.local import read_regular

VERSION = 1
_MARK = "dcpconv_keys"
_LARGEST = 256 * 2**20
"""Bytes.  A million keys take a tenth of it."""


def is_keylist(path: Path) -> bool:
    """Whether a file is a key list; looks at its first bytes only."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return f'"{_MARK}"'.encode() in file.read(256)


def to_text(weights: Weights) -> str:
    """The key list of a checkpoint: bare keys, without containers, wrappers and optimizer."""
    family = weights.keymap.name if weights.keymap else None
    lines = [
        f"    {json.dumps(key)}: "
        f'{{"dtype": "{entry.dtype.label}", "shape": {json.dumps(list(entry.shape))}}}'
        for key, entry in weights.entries.items()
    ]
    return "\n".join(
        [
            "{",
            f'  "{_MARK}": {VERSION},',
            f'  "family": {json.dumps(family)},',
            f'  "tied": {json.dumps(dict(weights.tied))},',
            '  "tensors": {',
            ",\n".join(lines),
            "  }",
            "}",
            "",
        ]
    )


def read_keylist(path: Path) -> tuple[Catalog, str | None]:
    """The tensors that a key list names, and the family it was written for, if one was known.

    Raises:
        FormatError: It is no key list of a version we know, or records are malformed; all are
            listed.
    """
    try:
        value = json.loads(read_regular(path, most=_LARGEST))
        if not isinstance(value, dict) or value.get(_MARK) != VERSION:
            raise ValueError(f"{_MARK} is not {VERSION}")
        records, family, tied = value["tensors"], value.get("family"), value.get("tied") or {}
        if not isinstance(records, dict) or not isinstance(tied, dict):
            raise TypeError("tensors and tied must be objects")
        if not (family is None or isinstance(family, str)):
            raise TypeError("family must be a name or null")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(
            "the key list cannot be read",
            [("file", path), ("because", error)],
            hint="`dcpconv keys SRC -o FILE` writes one",
        ) from None
    tensors = {key: entry for key, record in records.items() if (entry := _entry(key, record))}
    wrong = [
        ("key", f"{key}: {json.dumps(record)[:80]}")
        for key, record in records.items()
        if key not in tensors
    ]
    wrong += [
        ("tied", f"{key} names {owner!r}")
        for key, owner in tied.items()
        if not isinstance(owner, str) or key not in records or owner not in records
    ]
    if wrong:
        raise FormatError(
            "the key list has records that cannot be used",
            [("file", path), *wrong],
            hint='a record is {"dtype": "bf16", "shape": [131, 96]}',
        )
    return Catalog("hf", path.parent, path, {}, tensors, tied=tied), family


def is_model(value: object) -> bool:
    """Whether a value is a live model or its state_dict; torch itself is not needed to know."""
    return hasattr(value, "state_dict") or isinstance(value, Mapping)


def read_model(model: Any) -> Catalog:
    """The keys of a live model (the meta device is enough) or of a state_dict.

    Names that share one parameter are tied; values that are no tensors are left out.

    Args:
        model: An ``nn.Module``, or a mapping from keys to tensors.
    """
    is_module = hasattr(model, "state_dict")
    # keep_vars keeps parameters themselves, whose identity shows which names are tied.
    state = model.state_dict(keep_vars=True) if is_module else model
    tensors: dict[str, TensorEntry] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for key, value in state.items():
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if isinstance(value, TensorEntry):
            tensors[key] = value
        elif shape is not None and dtype is not None:
            known = BY_NAME[str(dtype).removeprefix("torch.")]
            tensors[key] = TensorEntry(key, known, tuple(map(int, shape)), ())
        owner = first.setdefault(id(value), key)
        if key in tensors and owner != key:
            tied[key] = owner
    return Catalog("torch", Path(), Path(), {}, tensors, tied=tied)


def _entry(key: str, record: object) -> TensorEntry | None:
    """A record as an entry, or ``None`` if it is malformed."""
    try:
        dtype, shape = record["dtype"], record["shape"]  # type: ignore[index]  # caught below
        known = dtype_named(dtype)
    except (TypeError, KeyError, AttributeError):
        return None
    if (
        known is None
        or not isinstance(shape, list)
        or any(type(n) is not int or n < 0 for n in shape)
    ):
        return None
    return TensorEntry(key, known, tuple(shape), ())
