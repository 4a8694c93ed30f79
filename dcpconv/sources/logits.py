"""What a checkpoint computes, by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcpconv.core.errors import KeymapError

_TOKENS = 24
"""Enough for RoPE to turn neighbours and halves apart."""

_STRIDE = 7919
"""A prime, so that no token comes twice."""


def logits_of(directory: Path) -> Any:
    """Logits of some tokens, in fp32; the model is in memory meanwhile.

    Args:
        directory: A checkpoint with its config.json.

    Raises:
        KeymapError: transformers is not there, or does not load it.
    """
    try:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - heavy
        from transformers.utils import logging  # noqa: PLC0415
    except ImportError as error:
        raise KeymapError(
            "logits need torch and transformers",
            [("because", error)],
            hint="without them, `families check` still tells whether the table is sound",
        ) from None
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="float32", attn_implementation="eager"
        )
    except (ValueError, OSError) as error:
        raise KeymapError(
            "transformers cannot load it, so that there are no logits to compare",
            [("checkpoint", directory), ("because", str(error).splitlines()[0])],
            hint="compare the logits with what the model's own code computes",
        ) from None
    model.eval().requires_grad_(requires_grad=False)
    weight = model.get_input_embeddings().weight
    tokens = [(_STRIDE * n + 1) % weight.shape[0] for n in range(_TOKENS)]
    return model(weight.new_tensor([tokens]).long()).logits
