"""A team's own test: the model in this repository takes the published weights.

Runs in seconds: the model is built on the meta device, and of the weights only headers are read.
Copy it beside the model; ``assert_covers`` is a fixture wherever dcpconv is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lingua_model import LinguaModel, LinguaParams

WEIGHTS = os.environ.get("WEIGHTS", "")
"""A path or a hub id."""


@pytest.mark.skipif(not WEIGHTS, reason="WEIGHTS names no checkpoint")
def test_the_model_takes_the_published_weights(assert_covers: Callable[..., Any]) -> None:
    """Fails with the report of ``dcpconv check``, every reason in it."""
    with torch.device("meta"):
        model = LinguaModel(
            LinguaParams(
                dim=96,
                n_layers=5,
                n_heads=6,
                n_kv_heads=2,
                ffn_dim_multiplier=0.59,
                multiple_of=8,
                vocab_size=131,
            )
        )
    assert_covers(model, WEIGHTS, to="lingua")
