"""Tables that declare axes, kinds of layers, sizes per kind and parts kept as stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv.core.errors import KeymapError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap, read_keymap
from dcpconv.plan.matching import cover
from dcpconv.sources.drafting import checked_keymap
from dcpconv.sources.recognition import recognise
from support.checkpoints.virtual import Virtual, carried_out, checkpoint, laid_out
from support.checkpoints.virtual_kinds import spec_of

ONE = """\
name = "one"
architectures = ["mixed"]

[axes]
x = "state_size"
y = "inner * heads"

[axes.attention]
g = "wide_groups"

[kinds]
attention = ["types: attention", "attention_layers from 1"]
mamba = "not attention"

[keys]
"embed" = ["embed", "V d"]
"layers.{L}.qkv" = ["layer.q | layer.k | layer.v", "(g [r two p | two p | e]) d", "attention"]
"layers.{L}.state" = ["layer.state", "x y d", "mamba"]
"layers.{L}.up" = ["layer.up", "f d"]

[kept]
"tower." = "vision tower"
"ahead." = "layers that predict ahead"
"""
OTHER = """\
name = "other"
architectures = ["mixed"]

[axes]
x = "state_size"
y = "inner * heads"

[axes.attention]
g = "wide_groups"

[kinds]
attention = ["types: attention", "attention_layers from 1"]
mamba = "not attention"

[keys]
"tok" = ["embed", "V d"]
"h.{L}.wq" = ["layer.q", "(h p two) d", "attention"]
"h.{L}.wk" = ["layer.k", "(g p two) d", "attention"]
"h.{L}.wv" = ["layer.v", "d (g e)", "attention"]
"h.{L}.s" = ["layer.state", "(y x) d", "mamba"]
"h.{L}.w3" = ["layer.up", "d f"]

[kept]
"eyes." = "vision tower"
"""
FIELDS: dict[str, Any] = {"state_size": 3, "inner": 2, "heads": 5, "wide_groups": 3}
TYPES = ["attention", "mamba"] * 6
STATED = [
    pytest.param({**FIELDS, "types": TYPES}, id="words"),
    pytest.param({**FIELDS, "attention_layers": [1, 3, 5, 7, 9, 11]}, id="numbers"),
]


def table(tmp_path: Path, text: str) -> Keymap:
    path = tmp_path / "table.toml"
    path.write_text(text)
    return read_keymap(path)


def with_tower(start: Virtual) -> Virtual:
    more = {
        "tower.patch.weight": ((2, 3), list(range(9000, 9006))),
        "tower.norm": ((2,), [9100, 9101]),
        "ahead.0.proj": ((3,), [9200, 9201, 9202]),
    }
    return laid_out({**start.tensors(), **more})


@pytest.mark.parametrize("stated", STATED)
def test_there_and_back(tmp_path: Path, stated: dict[str, Any]) -> None:
    one, other = table(tmp_path, ONE), table(tmp_path, OTHER)
    spec = spec_of("plain", n_layers=12, stated=stated)
    start = with_tower(checkpoint(one, spec))
    there = cover(recognise(start.catalog, keymap=one), other, spec=spec)
    assert there, list(there.facts())
    middle = carried_out(there, start)
    assert middle.tensor("eyes.norm") == start.tensor("tower.norm")
    assert [target.key for target in there.aside] == ["ahead.0.proj"]
    assert [(f.key, f.why) for f in there.ignored] == [
        ("ahead.0.proj", "layers that predict ahead")
    ]
    back = cover(recognise(middle.catalog, keymap=other), one, spec=spec)
    assert back, list(back.facts())
    found = carried_out(back, middle).tensors()
    assert found == {k: v for k, v in start.tensors().items() if not k.startswith("ahead.")}


def test_the_elements_are_where_the_layouts_say(tmp_path: Path) -> None:
    """Two query heads to each of three groups in layers with attention, three to each elsewhere."""
    one, other = table(tmp_path, ONE), table(tmp_path, OTHER)
    spec = spec_of("plain", n_layers=2, stated={**FIELDS, "types": ["mamba", "attention"]})
    start = checkpoint(one, spec)
    made = carried_out(cover(recognise(start.catalog, keymap=one), other, spec=spec), start)

    def tensor(held: Virtual, key: str) -> torch.Tensor:
        shape, elements = held.tensor(key)
        return torch.tensor(elements).reshape(shape)

    qkv = tensor(start, "layers.1.qkv").reshape(3, 4, 8, 5)
    halves = qkv[:, :2].reshape(6, 2, 4, 5).transpose(1, 2)
    assert torch.equal(tensor(made, "h.1.wq"), halves.reshape(48, 5))
    assert torch.equal(tensor(made, "h.1.wv"), qkv[:, 3].reshape(24, 5).T)
    state = tensor(start, "layers.0.state")
    assert torch.equal(tensor(made, "h.0.s"), state.transpose(0, 1).reshape(30, 5))


def test_keys_tell_kinds_where_no_file_does(tmp_path: Path) -> None:
    one, other = table(tmp_path, ONE), table(tmp_path, OTHER)
    spec = spec_of("plain", n_layers=12, stated={**FIELDS, "types": TYPES, "wide_groups": 2})
    start = checkpoint(one, spec)
    silent = ModelSpec(**{**dict(spec), "stated": {}})
    there = cover(recognise(start.catalog, keymap=one), other, spec=silent)
    assert not there.unknown
    assert {fault.key for fault in there.missing} == set()


def test_a_row_of_another_kind_is_missing(tmp_path: Path) -> None:
    one, other = table(tmp_path, ONE), table(tmp_path, OTHER)
    start = checkpoint(one, spec_of("plain", stated={**FIELDS, "types": ["attention", "mamba"]}))
    spec = spec_of("plain", stated={**FIELDS, "types": ["attention", "attention"]})
    found = cover(recognise(start.catalog, keymap=one), other, spec=spec)
    assert {fault.key for fault in found.missing} == {"h.1.wq", "h.1.wk", "h.1.wv"}
    assert [(fault.key, fault.why) for fault in found.unknown] == [
        ("layers.1.state", "the config says that the model has no mamba")
    ]


def test_a_tensor_of_another_size_than_its_kind_has_is_misshapen(tmp_path: Path) -> None:
    one, other = table(tmp_path, ONE), table(tmp_path, OTHER)
    start = checkpoint(one, spec_of("plain", stated={**FIELDS, "types": TYPES[:2]}))
    stated = {**FIELDS, "types": TYPES[:2], "wide_groups": 2, "state_size": 4}
    found = cover(recognise(start.catalog, keymap=one), other, spec=spec_of("plain", stated=stated))
    assert {(fault.key, fault.expected) for fault in found.misshapen} == {
        ("layers.0.qkv", "[80, 5]"),
        ("layers.1.state", "[4, 10, 5]"),
    }


def test_query_heads_within_a_group_agree_with_query_heads(tmp_path: Path) -> None:
    path = tmp_path / "one.toml"
    path.write_text(ONE)
    assert checked_keymap(path).name == "one"


BROKEN = [
    pytest.param('x = "state_size"', 'x = "a + b * c"', 5, "cannot read the size", id="size"),
    pytest.param('x = "state_size"', 'x-y = "a"', 5, "no name of an axis", id="axis"),
    pytest.param('"state_size"', "3", 5, "valid string", id="number"),
    pytest.param("[axes.attention]", "[axes.sliding]", 8, "no kind sliding", id="sizes-of-no-kind"),
    pytest.param('g = "wide', 'w = "wide', 9, "is no axis", id="size-of-no-axis"),
    pytest.param("not attention", "not linear", 13, "no kind 'linear'", id="rest"),
    pytest.param("not attention", "nor attention", 13, "cannot read the rule", id="rule"),
    pytest.param('mamba = "not', 'Mamba = "not', 13, "no name of a kind", id="kind"),
    pytest.param('"mamba"]', '"linear"]', 18, "no condition 'linear'", id="condition"),
    pytest.param("x y d", "x z d", 18, "axis z has no size", id="undeclared"),
    pytest.param('"tower."', '"tower"', 22, "no prefix", id="prefix"),
    pytest.param('"ahead."', '"tower.a."', 22, "begins another prefix", id="prefix-of-prefix"),
]


@pytest.mark.parametrize(("part", "instead", "line", "what"), BROKEN)
def test_a_broken_rule_is_told_with_its_line(
    tmp_path: Path, part: str, instead: str, line: int, what: str
) -> None:
    assert part in ONE
    with pytest.raises(KeymapError) as raised:
        table(tmp_path, ONE.replace(part, instead, 1))
    told = [(label, str(value)) for label, value in raised.value.facts]
    assert any(label == f"table.toml:{line}" and what in value for label, value in told), told


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    broken = ONE
    for part, instead in (
        ("state_size", "a + b * c"),
        ("not attention", "nor attention"),
        ('"tower."', '"t"'),
    ):
        broken = broken.replace(part, instead, 1)
    with pytest.raises(KeymapError) as raised:
        table(tmp_path, broken)
    assert [label for label, _ in raised.value.facts] == [f"table.toml:{n}" for n in (5, 13, 22)]
