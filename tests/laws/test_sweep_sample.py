"""Two dozen architectures of the sweep, chosen because they differ most."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging

from sweep import STEPS
from sweep.building import Architecture, architectures
from sweep.steps import prove

SAMPLE = (
    "llama",  # names in memory are those of files
    "mixtral",  # experts are stacked, two projections joined
    "deepseek_v3",  # latent attention, shared experts
    "gpt_neox",  # joined projections
    "jamba",  # attention, state spaces and experts in one model
    "falcon_h1",  # a table that the model around its layers computes
    "mamba",  # no attention
    "rwkv",  # neither
    "gpt2",  # matrices stored the other way round, a prefix that files leave out
    "bloom",  # the head is tied
    "bert",  # an encoder with a head
    "deberta-v2",  # relative positions
    "bart",  # two towers that share an embedding
    "t5",  # buckets of positions
    "whisper",  # sound to text
    "wav2vec2",  # weights in two factors
    "clip",  # two towers without a head
    "vit",  # everything renamed
    "dinov2",  # everything renamed, a mask token
    "convnext",  # convolutions
    "llava",  # towers under other names
    "qwen2_vl",  # another tower, other names
    "gemma3",  # towers, and norms around everything
    "paligemma",  # a projector between two towers
)
KNOWN = {one.model_type: one for one in architectures()}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.mark.filterwarnings("ignore")  # transformers' own remarks on tiny models
@pytest.mark.parametrize("one", [pytest.param(KNOWN[name], id=name) for name in SAMPLE])
def test_an_architecture_goes_everywhere_and_comes_back(one: Architecture, tmp_path: Path) -> None:
    results = prove(one, tmp_path, STEPS)
    wrong = {
        step: results[step] for step in STEPS if not results[step].startswith(("ok", "skipped"))
    }
    assert not wrong
