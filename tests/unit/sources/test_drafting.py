"""Drafting a table from keys, and checking one against ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dcpconv.core.errors import KeymapError
from dcpconv.families.keymaps import keymaps, read_keymap
from dcpconv.families.parameter_files import read_parameter_file
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.drafting import checked_keymap, draft, foreign_slots
from dcpconv.sources.explaining import Explanations
from dcpconv.sources.parameter_shapes import expected as expected_of
from support.checkpoints.virtual import checkpoint, slots_of
from support.checkpoints.virtual_kinds import spec_of
from support.models.hf_models import save_hf
from support.models.nested_models import small


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
        "tok.weight": torch.ones(7, 4),
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
    assert '# "tok.weight" = ["", ""]   # [7, 4]' in text
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


def stated(directory: Path, config: dict[str, object], state: dict[str, torch.Tensor]) -> str:
    directory.mkdir()
    torch.save(state, directory / "model.pth")
    said = Explanations(config, None)
    return draft(open_checkpoint(directory / "model.pth"), name="new", said=said)


@pytest.mark.parametrize(
    ("config", "rules"),
    [
        pytest.param(
            {"kinds": ["mamba", "attention", "mamba", "mamba"], "act": "silu"},
            {"mamba": "kinds: mamba", "attention": "kinds: attention"},
            id="words",
        ),
        pytest.param({"plan": "M*MM"}, {"mixer": "plan: M", "attn": "plan: *"}, id="letters"),
        pytest.param(
            {"attention_at": [1]}, {"attn": "attention_at", "mixer": "not attn"}, id="numbers"
        ),
        pytest.param(
            {"attention_at": [2]},
            {"attn": "attention_at from 1", "mixer": "not attn"},
            id="numbers-from-one",
        ),
        pytest.param(
            {"attn_layer_period": 8, "attn_layer_offset": 1},
            {"attn": "every attn_layer_period from attn_layer_offset", "mixer": "not attn"},
            id="stride",
        ),
    ],
)
def test_a_draft_tells_kinds_of_layers_from_the_config(
    tmp_path: Path, config: dict[str, object], rules: dict[str, str]
) -> None:
    config |= {"state": {"size": 5}, "ssm_heads": 2, "ssm_width": 3}
    state = {
        **{f"layers.{n}.mixer.conv": torch.ones(6, 5) for n in (0, 2, 3)},
        "layers.1.attn.q_proj.weight": torch.ones(4, 4),
    }
    text = stated(tmp_path / "in", config, state)
    mixer = next(kind for kind in rules if kind in {"mixer", "mamba"})
    attention = next(kind for kind in rules if kind in {"attn", "attention"})
    assert f'# "layers.{{L}}.mixer.conv" = ["", "(sh sw) ss", "{mixer}"]   # [6, 5]' in text
    (tmp_path / "new.toml").write_text(text)
    table = checked_keymap(tmp_path / "new.toml")
    assert {kind: rule for kind, (rule,) in table.declared.kinds.items()} == rules
    assert [row.when for row in table.rows] == [attention]
    assert table.declared.axes == {"sh": "ssm_heads", "sw": "ssm_width", "ss": "state.size"}


def test_what_no_field_explains_is_said_in_the_draft(tmp_path: Path) -> None:
    state = {f"layers.{n}.attn.q_proj.weight": torch.ones(4, 4) for n in (0, 3)}
    state["layers.1.mixer.conv"] = torch.ones(7)
    text = stated(tmp_path / "in", {"other": 3}, state)
    assert '# "layers.{L}.mixer.conv" = ["", ""]   # [7]  in some layers only' in text
    assert "[kinds]" not in text


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_a_draft_of_a_hybrid_is_the_table_that_we_have(tmp_path: Path, model_type: str) -> None:
    model = small(model_type)
    source = save_hf(model, tmp_path / "hf")
    beside = read_parameter_file(source)
    assert beside is not None
    said = Explanations(beside.fields, beside.spec)
    text = draft(open_checkpoint(source), architecture=model_type, said=said)
    (tmp_path / "draft.toml").write_text(text)
    drafted, ours = read_keymap(tmp_path / "draft.toml"), keymaps()[f"hf-{model_type}"]
    assert beside.spec is not None
    expected = {key: shape for key, shape, _ in expected_of(ours, beside.spec)}
    assert {key: shape for key, shape, _ in expected_of(drafted, beside.spec)} == expected
    for row in drafted.rows:
        (mine,) = [own for own in ours.rows if own.pattern.text == row.pattern.text]
        assert (row.slots, row.layout.text) == (mine.slots, mine.layout.text)
