"""What holds for every table that comes with the package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpconv.core.declared import Measured, fields_of
from dcpconv.families.configs import config_name
from dcpconv.families.keymaps import Keymap, Row, keymaps
from dcpconv.plan.matching import cover
from dcpconv.sources.parameter_shapes import expected
from dcpconv.sources.recognition import recognise
from support.checkpoints.virtual import carried_out, checkpoint, slots_of
from support.checkpoints.virtual_kinds import KINDS, spec_of

TABLES = list(keymaps().values())
EACH = [pytest.param(table, id=table.name) for table in TABLES]


_KINDS = {"layer_types", "indexer_types", "layers_block_type"}
"""Fields of a parameter file that say which layers are of which kind."""


def fits(table: Keymap, kind: str) -> bool:
    """Whether a table can spell every tensor of a kind that its conditions speak of."""
    spec = spec_of(kind)
    if table.same_sizes and spec.n_heads != spec.n_kv_heads:
        return False
    has_latent = any("c" in row.layout.axes(term) for row in table.rows for term in _terms(row))
    has_experts = any(slot.endswith(".router") for slot in table.slots)
    axes = Measured(spec, [table.declared]).axes()
    if not table.declared.axes.keys() <= axes.keys():
        return False
    return (
        _KINDS & fields_of(table.declared) == _KINDS & spec.stated.keys()
        and has_latent == (spec.latent is not None)
        and (has_experts or spec.experts is None)
        and (spec.experts is not None or set(table.always) <= slots_of(table, spec))
    )


def _terms(row: Row) -> range:
    return range(row.layout.terms)


@pytest.mark.parametrize("table", EACH)
def test_every_key_of_every_model_is_of_exactly_one_row(table: Keymap) -> None:
    patterns = {
        pattern: re.compile(re.sub(r"\\\{[A-Z]\\\}", r"\\d+", re.escape(pattern)))
        for pattern in [row.pattern.text for row in table.rows] + [p.text for p, _ in table.ignored]
    }
    for kind in KINDS:
        if not fits(table, kind):
            continue
        keys = [key for key, _, _ in expected(table, spec_of(kind, n_layers=11))]
        assert len(keys) == len(set(keys))
        for key in keys:
            hits = [text for text, pattern in patterns.items() if pattern.fullmatch(key)]
            match = table.match(key)
            assert match is not None
            assert match.row is not None
            assert hits == [match.row.pattern.text]
            assert match.row.pattern.key(match.indices) == key


@pytest.mark.parametrize("table", EACH)
def test_no_model_has_a_slot_twice(table: Keymap) -> None:
    for kind in KINDS:
        if not fits(table, kind):
            continue
        held: set[tuple[object, ...]] = set()
        for key, _, slots in expected(table, spec_of(kind)):
            match = table.match(key)
            assert match is not None
            for slot in slots:
                place = (slot, *sorted(match.indices.items()))
                assert place not in held
                held.add(place)


@pytest.mark.parametrize("table", EACH)
def test_every_row_is_of_some_model(table: Keymap) -> None:
    alive = set()
    for kind in KINDS:
        for tied in (False, True):
            spec = spec_of(kind, tied=tied)
            for key, _, _ in expected(table, spec):
                match = table.match(key)
                assert match is not None
                assert match.row is not None
                alive.add(match.row.pattern.text)
    assert {row.pattern.text for row in table.rows} == alive


def test_a_slot_has_the_same_axes_in_every_table() -> None:
    axes: dict[str, tuple[frozenset[str], str]] = {}
    for table in TABLES:
        for row in table.rows:
            for term, slot in enumerate(row.slots):
                same = frozenset(
                    {"h": "g"}.get(axis, axis)
                    if table.same_sizes and slot.startswith(("layer.k", "layer.v"))
                    else axis
                    for axis in row.canonical_axes(term)
                )
                known, where = axes.setdefault(slot, (same, table.name))
                assert same == known, f"{slot} in {table.name} and {where}"


@pytest.mark.parametrize("table", EACH)
def test_a_bias_lies_as_the_rows_of_its_weight_do(table: Keymap) -> None:
    """Else RoPE would turn other pairs of the bias than of what it is added to."""
    rows = {row.slots: row for row in table.rows}
    for slots, row in rows.items():
        bias = rows.get(tuple(f"{slot}_bias" for slot in slots))
        if bias is not None and slots != ("layer.router",):  # its bias chooses, and adds nothing
            # The weights of GPT-2's layers have what comes in first.
            is_turned = table.name == "hf-gpt2" and slots[0].startswith("layer.")
            outputs = slice(-1, None) if is_turned else slice(1)
            rows_of_weight = row.layout.nodes[outputs]
            if "E" in row.layout.axes():  # stacked, so that what comes in may come before
                rows_of_weight = tuple(n for n in row.layout.nodes if n in bias.layout.nodes)
            assert bias.layout.nodes == rows_of_weight, bias.pattern.text


@pytest.mark.parametrize("table", EACH)
def test_a_table_says_where_its_facts_come_from(table: Keymap) -> None:
    assert re.search(r"@[0-9a-f]{7}|transformers \d|THUDM/|meta-llama/", table.source)
    assert table.title
    assert table.architectures
    assert table.file.stem == table.name


@pytest.mark.parametrize("table", EACH)
def test_what_ties_ignores_and_derives_are_keys_of_the_table(table: Keymap) -> None:
    rows = {row.pattern.text for row in table.rows}
    ignored = {pattern.text for pattern, _ in table.ignored}
    assert {tie.owner for tie in table.ties} <= rows
    assert set(table.derived) <= rows | ignored
    assert set(table.always) <= table.slots
    assert all(reason for _, reason in table.ignored)


@pytest.mark.parametrize("table", EACH)
def test_a_table_with_a_parameter_file_can_write_one(table: Keymap) -> None:
    written = config_name(table.config)
    assert (written is None) == table.config.startswith("torchtitan")


def _pairs() -> list[tuple[str, str, str]]:
    found = []
    for kind in KINDS:
        able = [table for table in TABLES if fits(table, kind)]
        held = {table.name: slots_of(table, spec_of(kind)) for table in able}
        names = permutations((table.name for table in able), 2)
        found += [(one, other, kind) for one, other in names if held[one] == held[other]]
    return found


PAIRS = _pairs()


def test_most_tables_have_a_partner() -> None:
    alone = {t.name for t in TABLES} - {name for name, _, _ in PAIRS}
    assert alone == {
        # No other family has their norms, or does without a gate.
        *("hf-arcee", "hf-cohere", "hf-exaone4", "hf-olmo2"),
        "hf-stablelm",
        # No other has short convolutions; its relative has experts too.
        "hf-lfm2",
        # Positions are vectors or slopes; logits have a bias, or attention no norm of its own.
        *("hf-bloom", "hf-gpt2", "hf-phi"),
        # torchtitan stores a bias more, which it moves to balance experts.
        *("hf-gpt_oss", "torchtitan-gpt_oss"),
        # Its partner has a tower beside.
        "hf-qwen3_5_text",
    }


@settings(max_examples=400)
@given(
    pair=st.sampled_from(PAIRS),
    tied=st.booleans(),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    pairs=st.integers(1, 5),
    layers=st.integers(2, 3),
    data=st.data(),
)
def test_there_and_back_is_where_it_began(
    pair: tuple[str, str, str],
    *,
    tied: bool,
    heads: int,
    groups: int,
    pairs: int,
    layers: int,
    data: st.DataObject,
) -> None:
    one, other, kind = keymaps()[pair[0]], keymaps()[pair[1]], pair[2]
    equal = one.same_sizes or other.same_sizes
    sizes = {
        "n_heads": groups if equal else heads * groups,
        "n_kv_heads": groups,
        "head_dim": 2 * pairs,
        "n_layers": layers,
        "hidden_size": data.draw(st.integers(1, 6)),
        "ffn_size": data.draw(st.integers(1, 6)),
    }
    spec = spec_of(kind, tied=tied, **sizes)
    start = checkpoint(one, spec, seed=data.draw(st.integers(0, 9)))
    there = cover(recognise(start.catalog, keymap=one), other, spec=spec)
    assert there, list(there.facts())
    middle = carried_out(there, start)
    back = cover(recognise(middle.catalog, keymap=other), one, spec=spec)
    assert back, list(back.facts())
    found = carried_out(back, middle).tensors()
    wanted = start.tensors()
    assert {key: found[key] for key in wanted} == wanted
    seconds = {tie.key for tie in one.ties}
    assert found.keys() - wanted.keys() <= seconds


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        pytest.param(table, kind, id=f"{table.name}-{kind}")
        for table in TABLES
        for kind in KINDS
        if fits(table, kind)
    ],
)
def test_a_checkpoint_is_recognised_as_its_family_or_as_one_with_the_same_bytes(
    table: Keymap, kind: str
) -> None:
    start = checkpoint(table, spec_of(kind))
    found = recognise(start.catalog, architecture=_named(table))
    assert found.keymap is not None
    fitting = [found.keymap, *found.alternatives]
    assert table in fitting or any(_alike(table, other, start.catalog.tensors) for other in fitting)
    assert not found.rest
    for a, b in combinations(fitting, 2):
        assert not _alike(a, b, start.catalog.tensors)


def _named(table: Keymap) -> str | None:
    """What the parameter file says, where keys alone do not make the table a candidate."""
    return table.architectures[0] if table.by_name else None


def _alike(one: Keymap, other: Keymap, keys: Iterable[str]) -> bool:
    for key in keys:
        a, b = one.match(key), other.match(key)
        if a is None or b is None or a.row is None or b.row is None:
            return False
        if not a.row.same_storage(b.row):
            return False
    return True


@pytest.mark.parametrize("table", EACH)
def test_a_wrapper_does_not_hide_the_family(table: Keymap) -> None:
    kind = next(kind for kind in KINDS if fits(table, kind))
    start = checkpoint(table, spec_of(kind))
    plain = recognise(start.catalog, architecture=_named(table))
    for root in ("model.", "module._orig_mod."):
        entries = {root + key: entry for key, entry in start.catalog.tensors.items()}
        wrapped = recognise(replace(start.catalog, tensors=entries), architecture=_named(table))
        assert wrapped.keymap is plain.keymap
        assert wrapped.entries.keys() == plain.entries.keys()
