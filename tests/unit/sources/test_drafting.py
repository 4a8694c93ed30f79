"""Drafting a table from keys, and checking one against ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dcpconv.core.errors import KeymapError
from dcpconv.families.keymaps import keymaps, read_keymap
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.drafting import checked_keymap, draft, foreign_slots
from support.checkpoints.virtual import checkpoint, slots_of, spec_of


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("hf-llama", "plain"),
        ("lingua", "plain"),
        ("hf-phi3", "plain"),
        ("chatglm3", "qkv-bias"),
        ("hf-qwen3_moe", "experts-qk-norm"),
        ("hf-memory-qwen3_moe", "experts-qk-norm"),
        ("minimind3", "experts-shared"),
        ("hf-deepseek_v3", "latent"),
    ],
)
def test_a_draft_of_a_known_naming_finds_its_slots(tmp_path: Path, family: str, kind: str) -> None:
    table, spec = keymaps()[family], spec_of(kind, n_layers=11)
    path = tmp_path / "draft.toml"
    path.write_text(draft(checkpoint(table, spec).catalog))
    found = read_keymap(path)
    assert found.slots == slots_of(table, spec)
    texts = {row.pattern.text for row in found.rows}
    assert texts <= {row.pattern.text for row in table.rows}


def test_a_draft_of_a_new_naming_is_sound_and_leaves_out_what_it_cannot_know(
    tmp_path: Path,
) -> None:
    state = {
        "wte.weight": torch.ones(7, 4),
        "h.0.attn.q_proj.weight": torch.ones(4, 4),
        "h.1.attn.q_proj.weight": torch.ones(4, 4),
        "h.0.mixer.conv.2.weight": torch.ones(4, 1, 3),
        "h.1.mixer.conv.2.weight": torch.ones(4, 1, 3),
    }
    torch.save(state, tmp_path / "model.pth")
    text = draft(open_checkpoint(tmp_path / "model.pth"), name="new")
    (tmp_path / "new.toml").write_text(text)
    table = checked_keymap(tmp_path / "new.toml")
    assert {row.pattern.text: row.slots for row in table.rows} == {
        "h.{L}.attn.q_proj.weight": ("layer.q",)
    }
    assert '# "wte.weight" = ["", ""]   # [7, 4]' in text
    assert '# "h.{L}.mixer.conv.2.weight" = ["", ""]   # [4, 1, 3]' in text
    (said,) = re.findall(r'"h\.\{L\}\.attn\.q_proj\.weight".*', text)
    assert "or (h p two) d" in said  # shapes cannot tell which channels rotate together


OWN = """\
name = "{name}"
[keys]
"e" = ["embed", "V d"]
"layers.{{L}}.q" = ["layer.q", "{layout}"]
"layers.{{L}}.novel" = ["layer.novel", "d"]
"""


def test_a_table_that_agrees_with_ours_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN.format(name="own", layout="d (two h p)"))
    assert foreign_slots(checked_keymap(path)) == ["layer.novel"]


def test_what_no_table_of_ours_is_for_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    text = OWN.format(name="own", layout="(h two p) d")
    path.write_text('config = "nope"\n' + text)
    with pytest.raises(KeymapError) as raised:
        checked_keymap(path)
    told = [(where, str(what).partition(" is none of")[0]) for where, what in raised.value.facts]
    assert told == [("own.toml:1", "config: nope")]


@pytest.mark.parametrize(
    ("name", "layout", "problem"),
    [
        (
            "own",
            "(h e) d",
            ("own.toml:4", "layers.{L}.q: layer.q has the axes L d h p two, here L d e h"),
        ),
        ("lingua", "(h two p) d", ("own.toml:1", "the name lingua is taken by one of ours")),
    ],
)
def test_disagreement_with_our_tables_is_told_with_its_line(
    tmp_path: Path, name: str, layout: str, problem: tuple[str, str]
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN.format(name=name, layout=layout))
    with pytest.raises(KeymapError) as raised:
        checked_keymap(path)
    assert raised.value.facts == (problem,)
