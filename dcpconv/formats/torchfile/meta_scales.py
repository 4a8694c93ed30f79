"""Scales of fp8 experts, which Meta's Llama 4 releases keep in a file per rank beside the weights.

A weight is its elements times the scale of their column: ``fp8_scales_0.pt`` has one per expert and
column of what ``consolidated.00.pth`` has.

Source: ``llama4/scripts/quantize.py`` and ``llama4/quantization/loader.py`` of llama-models 0.3.0,
which quantise the rows of every expert's matrix turned over, and store it turned back.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.errors import FormatError
from dcpconv.formats import torchfile

SCALE = "_column_scale"
"""What is added to the key of a weight; the files call both as the module's parameter."""

_NAME = re.compile(r"fp8_scales_\d+\.pt")
_KEY = re.compile(r"(.*\bexperts\.)(w[123])")
_WEIGHTS = {"w1": "moe_w_in_eD_F", "w2": "moe_w_out_eF_D", "w3": "moe_w_swiglu_eD_F"}


def name(rank: int) -> str:
    """File of a rank.

    >>> name(3)
    'fp8_scales_3.pt'
    """
    return f"fp8_scales_{rank}.pt"


def are_beside(path: Path) -> bool:
    """Whether a directory holds such files."""
    return any(_NAME.fullmatch(file.name) for file in path.iterdir())


def with_scales(path: Path, catalogs: list[Catalog]) -> list[Catalog]:
    """Every rank's tensors with the scales of those that have some.

    Raises:
        FormatError: A rank's file is missing.
    """
    if not are_beside(path):
        return catalogs
    missing = [n for rank in range(len(catalogs)) if not (path / (n := name(rank))).is_file()]
    if missing:
        raise FormatError(
            "an fp8 release lacks scales",
            [("directory", path), *(("missing", item) for item in missing)],
            hint="fetch them; the elements mean nothing without",
        )
    return [_joined(one, path / name(rank)) for rank, one in enumerate(catalogs)]


def _joined(weights: Catalog, file: Path) -> Catalog:
    scales = torchfile.read_catalog(file)
    renamed: dict[str, TensorEntry] = {}
    for key, entry in scales.tensors.items():
        found = _KEY.fullmatch(key)
        own = f"{found[1]}{_WEIGHTS[found[2]]}{SCALE}" if found else key
        renamed[own] = replace(entry, key=own)
    return replace(
        weights,
        tensors={**weights.tensors, **renamed},
        files={**weights.files, **scales.files},
        identities={**weights.identities, **scales.identities},
    )
