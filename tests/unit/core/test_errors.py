"""Errors travel between ranks and are told again with other facts; their kind stays."""

from __future__ import annotations

import pickle

from dcpconv.core.errors import DcpconvError, FormatError, SpecError


def test_a_kind_survives_the_way_to_another_rank_and_other_facts() -> None:
    error = FormatError("names code", [("file", "a")], hint="trust it", kind="untrusted")
    for again in (pickle.loads(pickle.dumps(error)), error.with_facts(error.facts)):
        assert type(again) is FormatError
        assert (again.kind, again.hint, again.facts) == ("untrusted", "trust it", (("file", "a"),))
        assert str(again) == str(error)
    assert FormatError("cut short").kind == "damaged"


def test_other_facts_leave_the_first_error_alone() -> None:
    error = SpecError("wrong", [("field", "x")], hint="fix it")
    again = error.with_facts([("file", "f"), *error.facts])

    assert type(again) is SpecError
    assert again.facts == (("file", "f"), ("field", "x"))
    assert again.hint == "fix it"
    assert error.facts == (("field", "x"),)


def test_one_line_says_what_and_where() -> None:
    error = DcpconvError("too short", [("file", "a"), ("expected", 3)], hint="fetch it")
    assert error.in_one_line == "too short (file a, expected 3)"
    assert DcpconvError("nothing").in_one_line == "nothing"
