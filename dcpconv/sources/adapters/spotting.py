"""Tells adapters from models, by names of files and keys alone.

Source: peft 0.21.2 ``utils/save_and_load.py``; jingyaogong/minimind ``model/model_lora.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import NotExpressibleError
from dcpconv.sources.fitting import bare

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls the tensors."""

PART = re.compile(
    r"(?:(?P<module>.+)\.)?"
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
MINIMIND = re.compile(r"(?P<module>.+)\.lora\.(?P<part>[AB])\.weight")
_PREFIX = "base_model.model."
"""PEFT's own two modules."""


def weights_of(path: Path) -> Path | None:
    """The file with the tensors of a PEFT directory, or ``None`` where it is none."""
    places = [path, *(path / name for name in ("adapter_model", "adapter"))]
    files = (place / name for place in places for name in WEIGHTS)
    return next((file for file in files if file.is_file()), None) if path.is_dir() else None


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter and no model: a PEFT directory without weights of a base."""
    if weights_of(path) is None:
        return False
    names = {item.name for item in path.iterdir()}
    others = [n for n in names if n.endswith(".safetensors") and n not in WEIGHTS]
    others += [n for n in names if n.startswith(("pytorch_model", "model")) and n.endswith(".bin")]
    return not others and ".metadata" not in names


def adapter_in(source: Path) -> Path | None:
    """The directory of the adapter that a path is or lies in, or ``None`` for a model."""
    directory = source.parent if source.name in WEIGHTS else source
    return directory if is_adapter(directory) else None


def is_adapter_key(key: str) -> bool:
    """Whether a key is of LoRA."""
    return bool(PART.fullmatch(key) or MINIMIND.fullmatch(key))


def beside_note(source: Path) -> tuple[str, ...]:
    """What to say of a base whose directory also holds an adapter, which transformers loads too."""
    file = weights_of(source)
    if file is None or is_adapter(source):
        return ()
    name = file.relative_to(source)
    return (f"{name} is an adapter and was left out; --adapter {source} merges it",)


def require_model(catalog: Catalog, *, is_hf: bool, is_merged: bool) -> None:
    """Refuses factors of an adapter where a model is wanted.

    Raises:
        NotExpressibleError: The checkpoint holds some, and the result has no place for them.
    """
    if not (is_hf or is_merged):
        return
    factors = [key for key in catalog.tensors if is_adapter_key(in_base(bare(key)))]
    if factors:
        raise NotExpressibleError(
            "these are tensors of an adapter, which are no model; nothing was written",
            [
                ("source", catalog.source),
                *(("key", key) for key in factors[:5]),
                ("found", f"{len(factors)} of LoRA among {len(catalog.tensors)} keys"),
            ],
            hint=f"merge them into a base: dcpconv convert BASE DST --adapter {catalog.source}",
        )


def in_base(key: str) -> str:
    """A key below the base model: without PEFT's own two modules and containers before them."""
    return key.rpartition(_PREFIX)[2] if _PREFIX in key else key
