"""What tables declare: rules for sizes and kinds, read from a parameter file's fields."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dcpconv.core.declared import Measured, check_kind, check_size, fields_of, size_of
from dcpconv.core.errors import LayoutError
from dcpconv.core.spec import Declared
from support.checkpoints.virtual_kinds import spec_of

FIELDS = {
    "heads": 3,
    "dim": 8,
    "odd": 7,
    "word": "x",
    "flag": None,
    "ffn": [10, 20, 30],
    "ssm": {"state": {"size": 5}},
    "text_config": {"inner": 4, "heads": 9},
}


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        ("heads", 3),
        ("heads * dim", 24),
        ("heads * dim / 4", 6),
        ("heads * dim - 1", 23),
        ("heads + 2", 5),
        ("2 * heads + dim", 14),
        ("heads + none", None),
        ("heads - 4", None),
        ("2 * ssm.state.size", 10),
        ("inner", 4),
        ("odd / 2", None),
        ("odd / 0", None),
        ("word", None),
        ("flag", None),
        ("ssm", None),
        ("ssm.none", None),
        ("none", None),
        ("heads * none", None),
        ("none or heads", 3),
        ("word or heads * dim / 4", 6),
        ("odd / 2 or none or dim", 8),
        ("none or word", None),
    ],
)
def test_a_size_is_a_field_or_a_product(rule: str, size: int | None) -> None:
    check_size(rule)
    assert size_of(rule, FIELDS) == size


def test_a_list_gives_every_layer_its_own() -> None:
    assert [size_of("ffn / 5", FIELDS, layer) for layer in (0, 1, 2, 3)] == [2, 4, 6, None]


@pytest.mark.parametrize(
    "rule", ["", "heads*dim", "heads * ", "-1", "heads + dim * 2", "a..b", "a ", "a or", "or a"]
)
def test_what_is_no_size_is_told(rule: str) -> None:
    with pytest.raises(LayoutError, match="cannot read the size"):
        check_size(rule)


KINDS: dict[str, Any] = {
    "types": ["a", "b", "c", "a", "b"],
    "letters": "M*-EM",
    "listed": [0, 3],
    "after": {"one": [2, 4]},
    "step": 2,
    "start": 1,
    "dense": 2,
    "none_at_all": 0,
    "yes": True,
    "word": "b",
    "no": False,
    "narrow": 36,
}


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        ("types: a", {0, 3}),
        ("types: b, c", {1, 2, 4}),
        ("letters: M", {0, 4}),
        ("letters: *, E", {1, 3}),
        ("listed", {0, 3}),
        ("after.one from 1", {1, 3}),
        ("every step from start", {1, 3}),
        ("every 2 from step", {2, 4}),
        ("every 3 from start * 2", {2}),
        ("every step from step - 1", {1, 3}),
        ("first dense", {0, 1}),
        ("last dense", {3, 4}),
        ("last none_at_all", set()),
        ("other if yes", {0, 3}),
        ("other if no", set()),
        ("other if word: b", {0, 3}),
        ("other if word: c", set()),
        ("not other", {1, 2, 4}),
        ("yes", {0, 1, 2, 3, 4}),
        ("narrow", {0, 1, 2, 3, 4}),
        ("no", set()),
    ],
)
def test_a_kind_is_some_of_the_layers(rule: str, layers: set[int]) -> None:
    declared = Declared(kinds={"kind": (rule,), "other": ("listed",)})
    check_kind(rule, declared.kinds)
    model = Measured(spec_of("plain", n_layers=5, stated=KINDS), [declared])
    assert model.knows("kind & tied")
    assert {layer for layer in range(5) if model.has("kind", layer)} == layers
    assert {layer for layer in range(5) if model.has("kind & untied", layer)} == layers
    assert not any(model.has("kind & tied", layer) for layer in range(5))


@pytest.mark.parametrize(
    "rule",
    [
        *("none", "none: a", "types: a", "every none from 1", "first none", "last none", "types"),
        *("not other", "other if step", "listed_kind if none", "yes from 1"),
    ],
)
def test_a_kind_that_no_field_tells_is_not_known(rule: str) -> None:
    declared = Declared(kinds={"kind": (rule,), "other": ("none",), "listed_kind": ("listed",)})
    model = Measured(spec_of("plain", n_layers=6, stated=KINDS), [declared])
    assert not model.knows("kind")
    assert model.knows("untied")


def test_the_first_rule_counts_whose_fields_are_there() -> None:
    declared = Declared(kinds={"kind": ("none: a", "listed", "types: c")})
    model = Measured(spec_of("plain", n_layers=5, stated=KINDS), [declared])
    assert {layer for layer in range(5) if model.has("kind", layer)} == {0, 3}


@pytest.mark.parametrize(
    "rule", ["", "a:b", "every a", "every from b", "not", "from 1", "a from b"]
)
def test_what_is_no_kind_is_told(rule: str) -> None:
    with pytest.raises(LayoutError, match="cannot read the rule"):
        check_kind(rule, ())


@pytest.mark.parametrize("rule", ["not b", "b if c"])
def test_the_rest_of_a_kind_that_is_not_there_is_told(rule: str) -> None:
    with pytest.raises(LayoutError, match=re.escape("no kind 'b'")):
        check_kind(rule, {"a"})


def test_layers_of_a_kind_have_sizes_of_their_own() -> None:
    fields = {**KINDS, "wide": 12, "groups": 3, "state": 4}
    declared = Declared(
        axes={"N": "state"},
        of_kind={"wide": {"e": "wide", "g": "groups"}},
        kinds={"wide": ("types: a",)},
    )
    model = Measured(spec_of("plain", n_layers=5, stated=fields), [declared])
    assert model.axes()["N"] == 4
    assert dict(model.differing(0)) == {"e": 12, "p": 6, "g": 3, "r": 2}
    assert model.differing(1) == model.differing(None) == ()
    assert fields_of(declared) == {"state", "wide", "groups", "types"}
