"""Records: what fits is kept, and everything that does not is named at once."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Annotated

import pytest

from dcpconv.core.record import Json, Record, ValidationError, field


class Inner(Record):
    low: int
    high: int

    def agree(self) -> None:
        if self.low > self.high:
            raise ValueError("low exceeds high")


class Outer(Record, extra="allow"):
    rows: Annotated[int, field(ge=1, le=10)]
    share: Annotated[float, field(gt=0)] = 1.0
    name: str | None = field(default=None, names=("title", "name"))
    flag: bool = False
    ids: int | list[int] | None = None
    mixed: bool | int | None = None
    pair: tuple[int, ...] = ()
    inner: Inner | None = None
    more: Mapping[str, Json] = field(default_factory=dict)


def said(fields: object) -> list[tuple[tuple[str | int, ...], str]]:
    with pytest.raises(ValidationError) as raised:
        Outer.model_validate(fields)
    return [(item.loc, item.msg) for item in raised.value.problems]


def test_what_fits_is_kept() -> None:
    made = Outer.model_validate(
        {"rows": 3, "share": 2, "title": "t", "ids": [1, 2], "inner": {"low": 1, "high": 2}, "x": 9}
    )

    assert (made.rows, made.share, made.name, made.ids) == (3, 2.0, "t", [1, 2])
    assert type(made.share) is float
    assert made.inner == Inner(low=1, high=2)
    assert made.model_extra == {"x": 9}
    assert (made.flag, made.pair, dict(made.more)) == (False, (), {})


@pytest.mark.parametrize("value", [True, 7, None])
def test_a_union_keeps_the_value_as_it_is(value: int | None) -> None:
    assert Outer(rows=1, mixed=value).mixed is value


@pytest.mark.parametrize(
    ("field_", "value", "what"),
    [
        ("rows", 0, "Input should be greater than or equal to 1"),
        ("rows", 11, "Input should be less than or equal to 10"),
        ("rows", True, "Input should be a valid integer"),
        ("rows", 2.0, "Input should be a valid integer"),
        ("share", 0, "Input should be greater than 0"),
        ("share", float("nan"), "Input should be a finite number"),
        ("share", float("inf"), "Input should be a finite number"),
        ("share", "1", "Input should be a valid number"),
        ("name", 3, "Input should be a valid string"),
        ("flag", 1, "Input should be a valid boolean"),
        ("pair", [1], "Input should be a valid tuple"),
        ("more", [], "Input should be a valid dictionary"),
    ],
)
def test_what_does_not_fit_is_named(field_: str, value: object, what: str) -> None:
    assert said({"rows": 1, field_: value}) == [((field_,), what)]


def test_every_problem_is_listed_where_it_was_read() -> None:
    fields = {
        "title": 1,
        "ids": [1, "a"],
        "inner": {"low": 2, "high": 1},
        "more": {"a": {"b": object()}},
    }

    assert said(fields) == [
        (("rows",), "Field required"),
        (("title",), "Input should be a valid string"),
        (("ids",), "Input should be a valid integer"),
        (("ids", 1), "Input should be a valid integer"),
        (("inner",), "low exceeds high"),
        (("more", "a", "b"), "input was not a valid JSON value"),
    ]
    with pytest.raises(ValidationError, match="low: Field required; size: Extra inputs are not"):
        Inner.model_validate({"high": 1, "size": 2})


def test_a_record_is_a_value() -> None:
    one = Outer(rows=1, inner=Inner(low=1, high=2), pair=(1, 2))

    assert one == Outer.model_validate(one.model_dump())
    assert one.model_copy(update={"rows": 2}) != one
    assert pickle.loads(pickle.dumps(one)) == one
    assert hash(Inner(low=1, high=2)) == hash(Inner(low=1, high=2))
    assert one.model_dump(mode="json")["pair"] == [1, 2]
    assert repr(Inner(low=1, high=2)) == "Inner(low=1, high=2)"
    with pytest.raises(ValidationError, match="is immutable"):
        one.rows = 3  # type: ignore[misc]
