"""Reading tables: every rule broken is told with its line, and the pages about them are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dcpconv import convert
from dcpconv.cli import main as command_line
from dcpconv.core.errors import KeymapError
from dcpconv.families.keymaps import building, index, keymaps, read_keymap, resolve_family
from dcpconv.families.keymaps.building import TABLES
from dcpconv.families.keymaps.index import TABLE_INDEX, Tables, index_text
from dcpconv.families.keymaps.words import AXES, CONDITIONS
from docs.families_page import families_page
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    load_hf,
    torch_tensors,
)
from support.checkpoints.virtual_kinds import KINDS, spec_of
from support.models.hf_models import save_hf, tiny

DOCS = Path(__file__).parents[3] / "docs"

SOUND = """\
name = "mine"
architectures = ["llama"]

[keys]
"embed.weight" = ["embed", "V d"]
"layers.{L}.q" = ["layer.q", "(h two p) d"]
"layers.{L}.gate_up" = ["layer.gate | layer.up", "[f | f] d"]
"head.weight" = ["head", "V d", "untied"]

[tied]
"head.weight" = "embed.weight"

[ignore]
"rope.freqs" = "recomputed"
"""

BROKEN = [
    pytest.param(
        '"layers.{L}.q" = ["layer.q", "(h two p) d"]',
        '"layers.{L}.q" = ["layer.q", "(h two p d"]',
        "mine.toml:6",
        "expected ')'",
        id="layout",
    ),
    pytest.param(
        '"layers.{L}.q" = ["layer.q",', '"layers.{L}.q" = ["layer.q | layer.k",',
        "mine.toml:6", "2 slots but 1 alternatives", id="alternatives",
    ),
    pytest.param(
        '"[f | f] d"', '"[f | x] d"', "mine.toml:7", "axis x has no size", id="unknown-axis"
    ),
    pytest.param('"(h two p) d"', '"(h h) d"', "mine.toml:6", "occurs twice", id="axis-twice"),
    pytest.param('"(h two p) d"', '"L d"', "mine.toml:6", "index L occurs twice", id="index-twice"),
    pytest.param("{L}.q", "{Q}.q", "mine.toml:6", "{Q} is no index", id="unknown-index"),
    pytest.param('"untied"', '"sometimes"', "mine.toml:8", "no condition 'sometimes'", id="when"),
    pytest.param('"untied"', '"untied & x"', "mine.toml:8", "no condition 'x'", id="one-of-two"),
    pytest.param(
        '"layers.{L}.q" = ["layer.q", "(h two p) d"]',
        '"a.{L}" = ["layer.q", "d", "moe & tied"]\n"b.{L}" = ["layer.q", "d", "tied & moe"]',
        "mine.toml:7", "layer.q is also", id="slot-under-one-condition",
    ),
    pytest.param('["layer.q", "(h', '["embed", "(h', "mine.toml:6", "embed is also", id="slot"),
    pytest.param('"rope.freqs"', '"layers.3.q"', "mine.toml:14", "the same keys", id="overlap"),
    pytest.param('= "embed.weight"', '= "x.weight"', "mine.toml:8", "owner x.weight", id="owner"),
    pytest.param("[tied]", 'always = ["layer.k"]\n[tied]', "mine.toml:10", "required", id="key"),
    pytest.param('name = "mine"', 'name = "Mine!"', "mine.toml:1", "should match", id="name"),
    pytest.param('name = "mine"', 'name = "mine"\ncolour = 1', "mine.toml:2", "colour", id="field"),
    pytest.param('["embed", "V d"]', '["embed"]', "mine.toml:5", "embed.weight", id="short-row"),
    pytest.param("[tied]", "[spec]\ntheta = 1e6\n[tied]", "mine.toml:11", "no such", id="spec"),
    pytest.param("[tied]", "[hints]\nvocab = 3\n[tied]", "mine.toml:11", "no shape", id="hint"),
    pytest.param(
        "[ignore]", '[[published]]\nname = "s"\n[ignore]', "mine.toml:13", "n_heads", id="published"
    ),
    pytest.param('["llama"]', '["llama"', "file", "mine.toml", id="no-toml"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "instead", "where", "what"), BROKEN)
def test_a_broken_rule_is_told_with_its_line(
    tmp_path: Path, part: str, instead: str, where: str, what: str
) -> None:
    assert part in SOUND
    path = tmp_path / "mine.toml"
    path.write_text(SOUND.replace(part, instead, 1))
    with pytest.raises(KeymapError) as raised:
        read_keymap(path)
    told = [(label, str(value)) for label, value in raised.value.facts]
    assert any(label == where and what in value for label, value in told), told


LIKE = """
name    = "mine"
like    = "hf-qwen3_moe"
without = ["layer.q_norm", "layer.k_norm", "score"]

[keys]
"layers.{L}.experts.in" = ["layer.expert.gate | layer.expert.up", "E [m | m] d", "moe"]
"embed.weight"          = ["embed", "V d"]
"""


def test_a_table_that_is_like_another_takes_over_what_it_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(LIKE)
    mine, theirs = read_keymap(path), keymaps()["hf-qwen3_moe"]
    gone = {"layer.q_norm", "layer.k_norm", "score"}
    assert mine.slots == theirs.slots - gone
    assert [row.pattern.text for row, _ in mine.holders("layer.expert.up")] == [
        "layers.{L}.experts.in"
    ]
    same = {row.slots: row for row in theirs.rows}
    taken = [row for row in mine.rows if row.pattern.text not in LIKE]
    assert all(row == same[row.slots] for row in taken)
    assert len(mine.rows) == len(theirs.rows) - len(gone) - 1  # two rows of experts are one here
    # The head was tied to a key that is not there.
    assert theirs.ties
    assert not mine.ties


def test_a_table_like_one_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(LIKE.replace("hf-qwen3_moe", "../tables/hf-qwen3_moe"))
    with pytest.raises(KeymapError, match="does not exist"):
        read_keymap(path)


def test_a_table_is_read_anew_if_the_one_it_is_like_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in TABLES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = tmp_path / "hf-qwen3_moe.toml"
    table.write_text(table.read_text().replace('"model.norm.weight"', '"model.last_norm.weight"'))
    monkeypatch.setattr(index, "TABLES", tmp_path)
    monkeypatch.setattr(building, "TABLES", tmp_path)
    heads = Tables().heads
    for name in ("hf-qwen3_moe", "hf-dots1", "hf-memory-dots1"):
        assert "model.last_norm.weight" in heads[name].templates


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SOUND.replace("(h two p) d", "(h x) d").replace("untied", "never"))
    with pytest.raises(KeymapError) as raised:
        read_keymap(path)
    assert [label for label, _ in raised.value.facts] == ["mine.toml:6", "mine.toml:8"]


def test_a_table_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeymapError, match="cannot read"):
        read_keymap(tmp_path / "none.toml")


def test_axes_are_what_a_spec_has_sizes_for() -> None:
    assert set(AXES) == {axis for kind in KINDS for axis in spec_of(kind).axes()}


def test_conditions_are_what_models_differ_in() -> None:
    for table in keymaps().values():
        used = {word for row in table.rows for word in row.conditions}
        assert used <= {*CONDITIONS, *table.declared.kinds}
    for condition in set(CONDITIONS) - {"tied", "untied"}:
        answers = {spec_of(kind).has(condition, layer) for kind in KINDS for layer in (0, 1)}
        assert answers == {True, False}, condition


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        ("hf", "qwen3_moe", "hf-qwen3_moe"),
        ("hf-memory", "qwen3_moe", "hf-memory-qwen3_moe"),
        ("hf-memory", "llama", "hf-llama"),
        ("hf", "mistral", "hf-llama"),
        ("minimind2", "llama", "minimind2"),
    ],
)
def test_a_family_is_narrowed_down_by_architecture(
    name: str, architecture: str, expected: str
) -> None:
    assert resolve_family(name, architecture).name == expected


@pytest.mark.parametrize(
    ("name", "architecture", "what"),
    [("martian", None, "no family"), ("hf", "martian", "no table"), ("hf", None, "no table")],
)
def test_a_family_that_is_not_there_is_an_error(
    name: str, architecture: str | None, what: str
) -> None:
    with pytest.raises(KeymapError, match=what):
        resolve_family(name, architecture)


def test_the_page_of_families_is_what_the_tables_say() -> None:
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    assert page == families_page(), "run `make docs`"


def _blocks(kind: str) -> list[str]:
    text = (DOCS / "keymaps.md").read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def qwen1(directory: Path) -> Path:
    """A tiny Qwen of the first generation in the names of its own code, and its Qwen2 twin."""
    model = tiny("qwen2", num_key_value_heads=6, rms_norm_eps=1e-6)
    save_hf(model, directory / "twin")
    state = model.state_dict()
    made = {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
        "transformer.rotary_emb.inv_freq": torch.ones(8),
    }
    for layer in range(3):
        source, target = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            parts = [state[f"{source}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            made[f"{target}attn.c_attn.{kind}"] = torch.cat(parts)
        made |= {
            f"{target}ln_1.weight": state[f"{source}input_layernorm.weight"],
            f"{target}ln_2.weight": state[f"{source}post_attention_layernorm.weight"],
            f"{target}attn.c_proj.weight": state[f"{source}self_attn.o_proj.weight"],
            f"{target}mlp.w1.weight": state[f"{source}mlp.up_proj.weight"],
            f"{target}mlp.w2.weight": state[f"{source}mlp.gate_proj.weight"],
            f"{target}mlp.c_proj.weight": state[f"{source}mlp.down_proj.weight"],
        }
    torch.save(made, directory / "qwen.bin")
    return directory / "qwen.bin"


def test_the_five_steps_of_the_page_add_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = qwen1(tmp_path)
    (table,) = _blocks("toml")
    (tmp_path / "qwen1.toml").write_text(table)
    said = next(block for block in _blocks("console") if "families check" in block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", said.splitlines()[0].removeprefix("$ ").split())
    capsys.readouterr()  # what other packages print when a model is made
    with pytest.raises(SystemExit) as done:
        command_line()
    assert done.value.code == 0
    assert capsys.readouterr().out == "\n".join(said.splitlines()[1:]) + "\n"

    sizes = "heads=6,kv_heads=6"
    convert(
        source,
        tmp_path / "qwen2",
        form="hf",
        keymap="qwen1.toml",
        from_="qwen1",
        to="hf",
        spec=sizes,
    )
    assert_same(hf_tensors(tmp_path / "qwen2"), hf_tensors(tmp_path / "twin"))
    assert difference(load_hf(tmp_path / "qwen2"), load_hf(tmp_path / "twin")) < RIGHT

    convert(tmp_path / "qwen2", tmp_path / "back.bin", keymap="qwen1.toml", from_="hf", to="qwen1")
    expected = torch_tensors(source)
    del expected["transformer.rotary_emb.inv_freq"]
    assert_same(torch_tensors(tmp_path / "back.bin"), expected)


@pytest.mark.parametrize("name", keymaps())
def test_every_table_that_comes_along_keeps_the_rules(name: str) -> None:
    assert read_keymap(TABLES / f"{name}.toml") == keymaps()[name]


def test_the_index_says_what_the_tables_say() -> None:
    assert TABLE_INDEX.read_text(encoding="utf-8") == index_text(), "run `make docs`"


def test_only_tables_that_know_some_of_the_keys_are_read() -> None:
    fresh = Tables()

    assert not fresh.read
    assert [head.name for head in fresh.heads.values() if "tok_embeddings.weight" in head.templates]
    assert fresh["lingua"] == keymaps()["lingua"]
    assert list(fresh.read) == ["lingua"]


def test_a_table_that_was_edited_since_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in TABLES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = tmp_path / "meta.toml"
    table.write_text(table.read_text().replace('"norm.weight"', '"last.norm.weight"'))
    (tmp_path / "mine.toml").write_text(
        table.read_text().replace('name          = "meta"', 'name = "mine"')
    )
    monkeypatch.setattr(index, "TABLES", tmp_path)
    heads = Tables().heads

    assert "last.norm.weight" in heads["meta"].templates
    assert "last.norm.weight" in heads["mine"].templates
    assert heads["lingua"].templates == Tables().heads["lingua"].templates
