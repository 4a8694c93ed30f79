"""Proves a table by logits, where transformers has the class on both sides."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from dcpconv.conversion.convert import convert
from dcpconv.families.keymaps import Keymap
from dcpconv.sources.logits import logits_of

RIGHT: Final = 1e-4
"""Largest difference of equal models in fp32, in standard deviations of the logits; a wrong RoPE
layout is off by more than 1."""


def logit_difference(table: Keymap, source: Path, to: str) -> float:
    """Largest difference of logits before and after a conversion, over their standard deviation.

    Args:
        table: The naming of the source.
        source: A checkpoint that transformers loads, with its config.json.
        to: The naming to convert into; transformers loads the result too.

    Raises:
        KeymapError: transformers does not load one of them.
        DcpconvError: The conversion is refused.
    """
    with TemporaryDirectory(dir=source.parent, prefix=".dcpconv-") as work:
        result = Path(work) / "result"
        convert(source, result, form="hf", keymap=table.file, from_=table.name, to=to)
        before, after = logits_of(source), logits_of(result)
    return float((before - after).abs().max() / before.std())
