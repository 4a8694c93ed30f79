"""Drafts for classes that no table of ours is for: what the config says of shapes is heeded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dcpconv.cli.proving import RIGHT, logit_difference
from dcpconv.families.keymaps import Keymap, is_known
from dcpconv.families.parameter_files import read_parameter_file
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.drafting import checked_keymap, draft
from dcpconv.sources.explaining import Explanations
from support.models.hf_models import SIZES, save_hf
from support.models.layers import randomise

CLASSES: dict[str, dict[str, object]] = {
    "olmo3": {"layer_types": ["full_attention"] * 3},
    "olmo_hybrid": {"num_hidden_layers": 4},
    "minimax": {
        "head_dim": 16,
        "num_local_experts": 5,
        "block_size": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}


def drafted(model_type: str, directory: Path, more: str = "") -> tuple[Path, Keymap, str]:
    """A tiny checkpoint, the table that a draft makes of it, and the draft."""
    assert not is_known(model_type)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **CLASSES[model_type]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    source = save_hf(randomise(model, 0), directory / "in")
    beside = read_parameter_file(source)
    assert beside is not None
    said = Explanations(beside.fields, beside.spec)
    text = draft(open_checkpoint(source), architecture=beside.architecture, said=said)
    (directory / "my.toml").write_text(text + more)
    return source, checked_keymap(directory / "my.toml"), text


def slots(table: Keymap) -> dict[str, tuple[str, str, str]]:
    return {
        row.pattern.text: (" | ".join(row.slots), row.layout.text, row.when) for row in table.rows
    }


def test_a_draft_of_a_class_like_others_is_proved_by_logits(tmp_path: Path) -> None:
    facts = "\n[spec]\npre_norms = false\npost_norms = true\nqk_norm_whole = true\n"
    source, table, text = drafted("olmo3", tmp_path, facts)
    layer = "model.layers.{L}.self_attn"
    assert slots(table)[f"{layer}.q_norm.weight"] == ("layer.q_norm_whole", "(h two p)", "")
    assert slots(table)["lm_head.weight"] == ("head", "V d", "untied")
    assert "Not guessed" not in text
    assert logit_difference(table, source, "hf-olmo2") < RIGHT


def test_a_draft_of_a_hybrid_gives_no_slot_of_attention_to_its_other_layers(
    tmp_path: Path,
) -> None:
    _, table, text = drafted("olmo_hybrid", tmp_path)
    found = slots(table)
    for name, said in {
        "q_proj": ("layer.q", "(h two p) d", "full_attention"),
        "k_proj": ("layer.k", "(g two p) d", "full_attention"),
        "v_proj": ("layer.v", "(g e) d", "full_attention"),
        "o_proj": ("layer.o", "d (h e)", "full_attention"),
    }.items():
        assert found[f"model.layers.{{L}}.self_attn.{name}.weight"] == said
        assert f'# "model.layers.{{L}}.linear_attn.{name}.weight" = [""' in text


def test_a_draft_gives_no_slot_outside_of_layers_to_a_layer(tmp_path: Path) -> None:
    _, table, text = drafted("minimax", tmp_path)
    assert slots(table)["model.norm.weight"] == ("final_norm", "d", "")
    assert '# "model.layers.{L}.self_attn.norm.weight" = [""' in text


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_draft_is_sound_and_has_every_key(tmp_path: Path, model_type: str) -> None:
    source, table, text = drafted(model_type, tmp_path)
    for key in open_checkpoint(source).tensors:
        match = table.match(key)
        assert match is not None or key.rpartition(".layers.")[2].partition(".")[2] in text
