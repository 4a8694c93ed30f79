"""Heads and base models towards every naming there is: refused by name, or right by the answers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from dcpconv import convert
from dcpconv.core.errors import NotExpressibleError
from dcpconv.families.keymaps import keymaps
from dcpconv.plan.account import Aim, aim_at
from dcpconv.sources.understanding import Source, understand
from laws.test_heads_of_classes import CASES, answers, headed
from support.checkpoints.families import RIGHT
from support.models.hf_models import IN_TURN, ONE_KV_HEAD

PLAIN: Mapping[str, Mapping[str, Any]] = {
    "gpt_neox": IN_TURN,
    "starcoder2": ONE_KV_HEAD,
    "seed_oss": {"attention_bias": False},
    "ernie4_5": {"use_bias": False},
}
"""Switches with which other classes can hold a model."""


def aims(source: Source) -> dict[str, Aim]:
    """Where a source may be sent: every naming but its own and those of live models."""
    own = source.weights.require_keymap()
    return {
        name: aim_at(source, source.target_table(name))
        for name in keymaps()
        if name != own.name and not name.startswith("hf-memory")
    }


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_every_naming_refuses_it_by_name_or_gives_the_same_answers(
    tmp_path: Path, model_type: str, head: str
) -> None:
    model = headed(tmp_path / "in", model_type, head, **PLAIN.get(model_type, {}))
    fitting = []
    for name, going in aims(understand(tmp_path / "in")).items():
        if going.refused:
            with pytest.raises(NotExpressibleError) as raised:
                going.require_expressible(undone="nothing was written", allow_by=None)
            assert all(": " in str(v) for label, v in raised.value.facts if label == "refused")
            continue
        assert going.cover(), name
        fitting.append(name)
    # Answers of one target that the name of the case chooses: over all cases they take turns.
    for name in fitting[zlib.crc32(f"{model_type} {head}".encode()) % max(len(fitting), 1) :][:1]:
        convert(tmp_path / "in", tmp_path / name, form="hf", to=name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        cls = getattr(transformers, written["architectures"][0])
        other, info = cls.from_pretrained(
            tmp_path / name, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"] or head == "no_head"
        assert not info["unexpected_keys"]
        assert float((answers(other.eval()) - answers(model)).abs().max()) < RIGHT, name
